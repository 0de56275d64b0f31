"""The speed benchmark at toy sizes: what it measures and how it says it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import bench_speed  # noqa: E402
from shapes import SHAPES  # noqa: E402
from speed import bundles, slices, weights  # noqa: E402

TIMES = {"median_ms": 10.0}
FOUND = {
    "llava7b": {
        "parts": {"prefill": {"dense": TIMES, "compressed": {"median_ms": 4.0}, "speedup": 2.5, "kept": 0.33, "efficiency": 0.825}},
    },
    "tiny": {
        "latency": {
            "ort": {
                "end_to_end": {"original": TIMES, "compressed": {"median_ms": 5.0}, "speedup": 2.0, "flops_kept": 0.33},
            }
        }
    },
}


SIZES = {
    "hidden": 128,
    "layers": 3,
    "heads": 8,
    "ffn": 512,
    "vision_hidden": 64,
    "vision_heads": 8,
    "vision_ffn": 256,
    "rank_multiple": 4,
}
SMALL = replace(SHAPES["small"], **SIZES)
INT4 = {
    "parts": {"decode": {"float": TIMES, "int4": {"median_ms": 4.0}, "speedup": 2.5, "bytes_ratio": 0.16}},
    "bundle": {
        "size_ratio": 0.21,
        "drop_points": 0.5,
        "tasks": {"vqa": {"original": 0.95, "compressed": 0.9, "quantised": 0.895, "n": 100}},
    },
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return slices.measure(SMALL, tmp_path_factory.mktemp("slices"), threads=1, seconds=0.2)["parts"]


def test_every_part_keeps_at_most_its_share_and_efficiency_is_speedup_times_that(measured):
    assert list(measured) == ["vision", "prefill", "decode"]
    for part, x in measured.items():
        assert x["dense"]["n"] == x["compressed"]["n"] >= 3
        assert x["speedup"] == x["dense"]["median_ms"] / x["compressed"]["median_ms"]
        assert x["efficiency"] == pytest.approx(x["speedup"] * x["kept"])
        assert 0.2 < x["kept"] < 0.6, part


def test_slices_have_true_sizes():
    shape = slices.slice_of(4)
    assert (shape.layers, shape.vision_layers, shape.hidden, shape.ffn, shape.prompt) == (4, 5, 4096, 11008, 640)


def test_figures_and_table():
    assert bench_speed.figures(FOUND) == [
        {"name": "llava7b.prefill.efficiency", "value": 0.825},
        {"name": "tiny.end_to_end.speedup", "value": 2.0},
    ]
    text = bench_speed.table(FOUND, [{"what": "smol", "reason": "not built"}], 2)
    assert "| LLaVA-1.5-7B, slices | prefill | 10 ms | 4 ms | 2.50x | 0.330 | 82% |" in text
    assert "| tiny-llava | end_to_end | 10 ms | 5 ms | 2.00x | 0.330 | 66% |" in text
    assert "- Not measured: smol (not built)" in text


def test_figures_and_table_of_int4_weights():
    assert bench_speed.figures({"int4": INT4}) == [
        {"name": "int4.size_ratio", "value": 0.21},
        {"name": "int4.decode_speedup", "value": 2.5},
        {"name": "int4.accuracy_drop_points", "value": 0.5},
    ]
    text = bench_speed.table({"int4": INT4}, [], 2)
    assert "| decode | 10 ms | 4 ms | 2.50x | 0.160 |" in text
    assert "lose 0.50 points of accuracy (original, compressed, int4: vqa 0.950, 0.900, 0.895)" in text


def test_int4_slices_are_timed_in_turn_and_a_bundle_is_read(tmp_path, monkeypatch):
    def command(*line):
        out = line[line.index("--out") + 1]
        out.mkdir()
        task = {"original": 1.0, "compressed": 0.9, "quantised": 0.88, "n": 10}
        report = {"size": {"compressed_bytes": 100, "quantised_bytes": 20}, "accuracy": {"vqa": task, "gqa": task | {"quantised": 0.9}}}
        (out / "report.json").write_text(json.dumps(report))
        lines.append(line)

    lines = []
    monkeypatch.setattr(bundles, "command", command)
    found = weights.measure(SMALL, tmp_path, threads=1, seconds=0.1)
    assert lines[0][:7] == ("tiny-llava", "--flops", "0.33", "--train-steps", 240, "--weights", "int4")
    assert found["bundle"]["size_ratio"] == 0.2 and found["bundle"]["drop_points"] == pytest.approx(1)
    assert list(found["parts"]) == ["vision", "prefill", "decode"]
    for part, x in found["parts"].items():
        assert x["float"]["n"] == x["int4"]["n"] >= 3
        assert x["speedup"] == x["float"]["median_ms"] / x["int4"]["median_ms"]
        assert 0.1 < x["bytes_ratio"] < (0.7 if part == "vision" else 0.3)  # the smaller, the more is patches and positions


def test_a_section_that_fails_is_named_and_the_rest_is_written(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("exit code 2: no such recipe")

    monkeypatch.setattr(bundles, "measure", fail)
    assert bench_speed.main(["--only", "tiny", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["checks"] == []
    assert json.loads((tmp_path / "results.json").read_text())["not_measured"] == [
        {"what": "tiny", "reason": "RuntimeError: exit code 2: no such recipe"}
    ]
    assert "exit code 2" in (tmp_path / "table.md").read_text()


def test_what_is_not_asked_for_stays_with_its_commit(tmp_path, monkeypatch):
    before = {name: section | {"commit": "earlier"} for name, section in FOUND.items()}
    (tmp_path / "results.json").write_text(json.dumps({"sections": before}))
    monkeypatch.setattr(bundles, "measure", lambda *arguments: FOUND["tiny"])
    assert bench_speed.main(["--only", "tiny", "--out", str(tmp_path)]) == 0
    sections = json.loads((tmp_path / "results.json").read_text())["sections"]
    assert sections["llava7b"] == before["llava7b"] and sections["tiny"]["commit"] != "earlier"
    assert len(json.loads((tmp_path / "summary.json").read_text())["checks"]) == 2
    assert "LLaVA-1.5-7B" in (tmp_path / "table.md").read_text()
