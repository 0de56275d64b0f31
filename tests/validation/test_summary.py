from __future__ import annotations

import io

import pytest
from rich.console import Console

from infoprune_export.validation.records import LatencySettings
from infoprune_export.validation.summary import latency_table, summary_table


def printed(renderable, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(renderable)
    return out.getvalue()


def test_it_says_what_was_asked_and_reached(report):
    text = printed(summary_table(report))
    for figure in (
        "asked for at most 0.700",
        "trained: 240 steps on 1 image with 1,200 questions of tiny:vqa",
        "12.0 MB",
        "8.00 MB",
        "0.950",
        "0.925",
        "-2.5 points",
        "20.0 ms",
        "1.43x",
        "passed  numerics",
    ):
        assert figure in text
    assert "not measured: latency.trt" in text


@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
def test_tables_fit_80_columns_uncut(report, scale):
    for part in report.latency["ort"].values():
        for side in (part.original, part.compressed):
            for name in ("median_ms", "p90_ms", "p99_ms", "mean_ms", "min_ms", "max_ms"):
                setattr(side, name, scale * getattr(side, name))
    for table in (summary_table(report), latency_table(report)):
        text = printed(table)
        assert max(map(len, text.splitlines())) <= 80 and "…" not in text


def test_a_failed_gate_and_its_reason_are_said(report):
    report.numerics["vision_encoder"].message = "vision_encoder (ort, fp32): 1 of 6 values of the engine are NaN or infinite"
    report.gates["numerics"].passed = False
    text = printed(summary_table(report))
    assert "FAILED  numerics" in text and "NaN or infinite" in " ".join(text.split())


def test_accuracy_of_an_earlier_report_is_said_to_be(report):
    assert "earlier report" not in printed(summary_table(report))
    report.accuracy["vqa"].measured_at = "2026-01-01T00:00:00Z"
    assert "accuracy: kept of an earlier report, measured 2026-01-01T00:00:00Z" in printed(summary_table(report))


def test_user_strings_are_not_read_as_markup(report):
    report.accuracy = {"[bold]x[/]": report.accuracy["vqa"]}
    report.name = "[red]name[/]"
    text = printed(summary_table(report))
    assert "[bold]x[/]" in text and "[red]name[/]" in text


def test_order_statistics_of_both_sides(report):
    text = printed(latency_table(report))
    assert text.count("original") == text.count("compressed") == 4
    for column in ("min", "mean", "median", "p90", "p95", "p99", "max"):
        assert column in text


def test_the_settings_that_change_a_figure(report):
    report.latency_settings["ort"] = LatencySettings(
        dtype="fp32", threads=2, workload=report.workload, seconds_per_part=5, warmup_rounds=2, cpus=[0, 1, 3], load_average=0.4
    )
    text = " ".join(printed(latency_table(report)).split())
    assert "fp32, 2 threads; on CPUs 0-1,3; 2 warm-up rounds, then 5 s a part, both networks in turn; host to host; load" in text
    assert "load average before 0.4" in text
    settings = report.latency_settings["ort"]
    settings.devices = {"vision_encoder": "cuda", "decoder_model_merged": "cuda"}
    assert "fp32 on cuda, 2 threads" in " ".join(printed(latency_table(report)).split())
    settings.devices["decoder_model_merged"] = "cpu"
    assert "fp32 on vision_encoder cuda, decoder_model_merged cpu, 2 threads" in " ".join(printed(latency_table(report)).split())


def test_without_an_original(report):
    for part in report.latency["ort"].values():
        part.original = part.speedup = None
    report.accuracy["vqa"].original = report.accuracy["vqa"].drop_points = report.size.original_bytes = None
    assert "None" not in printed(summary_table(report)) + printed(latency_table(report))
