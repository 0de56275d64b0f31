"""The scale benchmark on a network of a few layers: real runs and kills, small sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools")]

import bench_scale  # noqa: E402
from scale import factor, shapes  # noqa: E402
from scale.runs import Run, killed_once_more  # noqa: E402

TINY = shapes.Size("tiny", 64, 2, 2, 128, 2, 28)


def test_a_line_through_points():
    assert bench_scale.line([1, 2, 3], [3, 5, 7]) == pytest.approx({"slope": 2, "level": 1, "r2": 1})
    assert bench_scale.line([1, 2, 3, 4], [1, 0, 1, 0])["r2"] < 0.3


def test_sizes_are_what_their_names_say(tmp_path):
    from infoprune_export.models.random_weights import RandomCheckpoint

    for name, size in shapes.SIZES.items():
        config = size.write(tmp_path / name)
        total = sum(p.numel() for p in RandomCheckpoint(config / "config.json", 0).model.parameters())
        assert total / 1e9 == pytest.approx(float(name), rel=0.35), name


def test_our_pair_is_as_good_as_svd_llms():
    found = factor.measure(96, 200, 24, rounds=2, threads=1)
    assert found["error"] <= 1.001 and found["speedup"] > 0
    narrowing = factor.measure(200, 96, 24, rounds=1, threads=1)
    assert narrowing["error"] <= 1.001


@pytest.mark.slow
def test_runs_that_are_killed_come_to_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SIZES", {"0.1": TINY})
    monkeypatch.setattr(bench_scale, "SAMPLES", 4)
    monkeypatch.setattr(bench_scale, "FLOPS", 0.6)
    command = ["--quick", "--only", "kill", "--out", str(tmp_path)]
    for kills in (1, 2):  # what is known of the first counts
        assert bench_scale.main([*command, "--kills", str(kills)]) == 0
        values = {c["name"]: c["value"] for c in json.loads((tmp_path / "summary.json").read_text())["checks"]}
        assert values == {"kill.identical": kills, "kill.tried": kills}
    (found,) = json.loads((tmp_path / "results.json").read_text())["sections"].values()
    assert len(found["moments"]) == 2


def test_a_bundle_of_other_bytes_is_not_identical(tmp_path, monkeypatch):
    run = Run("unused", tmp_path / "out", 4)
    monkeypatch.setattr(Run, "killed_after", lambda self, seconds: True)
    monkeypatch.setattr(Run, "whole", lambda self: (self.out / "model").mkdir(parents=True) or (self.out / "plan.json").write_text("{}"))
    before = {"seconds": 10.0, "expected": {"plan.json": "another"}, "tried": 3, "identical": 3, "moments": [1.0, 2.0, 3.0]}
    after = killed_once_more(run, before)
    assert (after["tried"], after["identical"], len(after["moments"])) == (4, 3, 4) and not run.out.exists()


@pytest.mark.slow
def test_the_benchmark_writes_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SIZES", {"0.1": TINY, "0.2": shapes.Size("t2", 64, 3, 2, 128, 2, 28), "0.3": TINY})
    monkeypatch.setattr(bench_scale, "SAMPLES", 4)
    monkeypatch.setattr(bench_scale, "FLOPS", 0.6)  # of so small a network the output head is a third
    assert (
        bench_scale.main(["--quick", "--only", "scaling", "--out", str(tmp_path), "--size", "0.1", "--size", "0.2", "--size", "0.3"]) == 0
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {c["name"] for c in summary["checks"]} == {"scaling.time_fit", "scaling.memory_growth_gib", "scaling.layer_growth_gib"}
    assert "R^2" in (tmp_path / "table.md").read_text()
