from __future__ import annotations

import errno
import json

import pytest

from infoprune_export.errors import InputError, NotEnough
from infoprune_export.validation import report as report_module
from infoprune_export.validation.report import Report


def test_the_keys_others_rely_on(report):
    data = json.loads(report.to_json())
    assert data["schema_version"] == 1
    assert set(data["flops"]) == {"denominator", "scope", "requested", "achieved", "original", "compressed", "parts"}
    assert set(data["accuracy"]["vqa"]) >= {"original", "compressed", "n", "metric"}
    assert set(data["numerics"]["vision_encoder"]) >= {"dtype", "max_abs", "max_rel", "cosine", "passed"}
    assert set(data["numerics"]["generation"]) >= {"prompts", "identical_token_ids", "passed"}
    assert set(data["latency"]["ort"]) == {"vision", "prefill", "decode", "end_to_end"}
    for part in data["latency"]["ort"].values():
        assert {"original", "compressed", "speedup", "flops_kept"} <= set(part)
        for side in ("original", "compressed"):
            assert {"median_ms", "p90_ms", "p99_ms", "n"} <= set(part[side])
    assert {"original_bytes", "compressed_bytes"} <= set(data["size"])
    assert {"gates", "machine"} <= set(data)
    assert all({"what", "reason"} == set(entry) for entry in data["not_measured"])


def test_it_reads_back_as_it_was_written(report, plan, tmp_path):
    report.write(tmp_path, plan)
    assert Report.read(tmp_path / "report.json") == report
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [(errno.EROFS, InputError, "the report cannot be written there"), (errno.ENOSPC, NotEnough, "the disk is full")],
)
def test_a_report_that_cannot_be_written(report, plan, tmp_path, monkeypatch, code, error, message):
    def refuse(path, text):
        raise OSError(code, "no")

    monkeypatch.setattr(report_module, "write_whole", refuse)
    with pytest.raises(error, match=message):
        report.write(tmp_path, plan)


def test_a_damaged_report_is_refused(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(InputError, match=r"report\.json"):
        Report.read(tmp_path / "report.json")


def test_what_making_took_is_kept_by_later_reports(report, plan, tmp_path):
    from infoprune_export.validation.records import Estimate, Resources

    took = Resources(
        memory_bytes=Estimate(predicted=5e9, measured=4.5e9),
        disk_bytes=Estimate(predicted=1e9, measured=None),
        seconds=Estimate(predicted=60, measured=3725),
        parts={"calibration": 3000.0, "algebra": 700.0, "files": 25.0},
    )
    report.model_copy(update={"resources": took}).write(tmp_path, plan)
    assert Report.read(tmp_path / "report.json").resources == took
    report.write(tmp_path, plan)
    assert Report.read(tmp_path / "report.json").resources == took
    page = (tmp_path / "report.html").read_text()
    assert "4.50 GB, predicted 5.00 GB" in page and "1 h 2 min, predicted 1 min 0 s without training (calibration 50 min 0 s" in page
    assert "a killed run was gone on from" in page


def test_a_task_that_is_not_measured_now_is_kept_beside_those_that_are(report, plan, tmp_path):
    first = report.model_copy(update={"accuracy": {**report.accuracy, "gqa": report.accuracy["vqa"]}})
    first.write(tmp_path, plan)
    report.write(tmp_path, plan)
    accuracy = Report.read(tmp_path / "report.json").accuracy
    assert accuracy["vqa"].measured_at is None and accuracy["gqa"].measured_at == first.measured_at
