"""What decides the exit code, and what does not pass for it."""

from __future__ import annotations

import pytest

from infoprune_export.errors import GateFailed
from infoprune_export.validation.gates import judge
from infoprune_export.validation.records import NotMeasured, Quantisation


def test_numerics_is_always_a_gate(report):
    assert list(judge(report)) == ["numerics"]
    assert judge(report)["numerics"].passed
    report.numerics["vision_encoder"].passed = False
    gate = judge(report)["numerics"]
    assert not gate.passed and gate.measured == "vision_encoder failed"
    report.numerics.clear()
    assert not judge(report)["numerics"].passed, "what was not checked has not passed"


@pytest.mark.parametrize(("allowed", "passed"), [(2.5, True), (2.4, False), (3.0, True)])
def test_largest_drop(report, allowed, passed):
    gate = judge(report, max_drop=allowed)["max_drop"]
    assert gate.passed is passed and gate.measured == "2.50 points lost on vqa"


@pytest.mark.parametrize(("wanted", "passed"), [(1.42, True), (1.43, False)])
def test_smallest_speedup_is_end_to_end(report, wanted, passed):
    assert report.latency["ort"]["end_to_end"].speedup == pytest.approx(20 / 14)
    assert judge(report, min_speedup=wanted)["min_speedup"].passed is passed


def test_a_gain_is_not_called_a_loss(report):
    report.accuracy["vqa"].drop_points = -1.5
    gate = judge(report, max_drop=0)["max_drop"]
    assert gate.passed and gate.measured == "1.50 points gained on vqa"


def test_a_gate_on_something_not_measured_does_not_pass(report):
    report.accuracy["vqa"].drop_points = None
    report.latency["ort"].pop("end_to_end")
    gates = judge(report, max_drop=100, min_speedup=0.1)
    assert not gates["max_drop"].passed and not gates["min_speedup"].passed
    assert gates["max_drop"].measured == gates["min_speedup"].measured == "not measured"


def test_failed_gates_are_exit_code_1_and_named(report):
    report.raise_for_gates()
    report.gates = judge(report, max_drop=1, min_speedup=2)
    with pytest.raises(GateFailed, match=r"max_drop: 2.50 points lost on vqa, required at most 1 points on any task; min_speedup") as e:
        report.raise_for_gates()
    assert e.value.exit_code == 1 and not report.passed


def test_gates_are_on_the_network_that_was_asked_for(report):
    """With quantised weights, that is the quantised one, however good the float one is."""
    report.quantisation = Quantisation(weights="int4", block_size=32)
    end = report.latency["ort"]["end_to_end"]
    gates = judge(report, max_drop=100, min_speedup=0.1)  # it was not measured, the float one was
    assert gates["max_drop"].measured == gates["min_speedup"].measured == "not measured"
    assert not gates["max_drop"].passed and not gates["min_speedup"].passed
    report.accuracy["vqa"].quantised, report.accuracy["vqa"].quantised_drop_points = 0.9, 5.0
    end.quantised, end.quantised_speedup = end.compressed, 1.1
    gates = judge(report, max_drop=3, min_speedup=1.2)
    assert gates["max_drop"].measured == "5.00 points lost on vqa" and not gates["max_drop"].passed
    assert gates["min_speedup"].measured == "1.10x on ort" and not gates["min_speedup"].passed
    end.quantised_speedup = report.accuracy["vqa"].quantised_drop_points = None  # it was measured, the original was not
    assert not any(gate.passed for name, gate in judge(report, max_drop=3, min_speedup=1.2).items() if name != "numerics")


def test_a_gate_on_something_half_measured_does_not_pass(report):
    """Data for one task are not here, and one engine's original did not run."""
    report.not_measured.append(NotMeasured(what="accuracy.textvqa", reason="not here"))
    report.latency["onnx"] = {"end_to_end": report.latency["ort"]["end_to_end"].model_copy(update={"original": None, "speedup": None})}
    gates = judge(report, max_drop=100, min_speedup=0.1)
    assert not gates["max_drop"].passed and gates["max_drop"].measured == "2.50 points lost on vqa; not measured: textvqa"
    assert not gates["min_speedup"].passed and gates["min_speedup"].measured == "1.43x on ort; not measured: onnx"
