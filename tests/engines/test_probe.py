"""Where a half-precision graph first leaves its range."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper
from toy_graphs import save

from infoprune_export.engines.probe import Probe

WIDTH = 8


@pytest.fixture
def chain(tmp_path):
    """y = norm(((x a + bias) b) * gate) c, with a gain on each of the three products."""

    def make(a=1.0, gate=1.0, c=1.0):
        eye = np.eye(WIDTH, dtype=np.float16)
        weights = {"first.weight": a * eye, "second.weight": eye, "last.weight": c * eye, "bias": np.full(WIDTH, 1, np.float16)}
        weights |= {"gate": np.full(WIDTH, gate, np.float16), "gain": np.ones(WIDTH, np.float16)}
        nodes = [
            helper.make_node("MatMul", ["x", "first.weight"], ["h0"]),
            helper.make_node("Add", ["h0", "bias"], ["h1"]),
            helper.make_node("MatMul", ["h1", "second.weight"], ["h2"]),
            helper.make_node("Mul", ["h2", "gate"], ["h3"]),
            helper.make_node("RMSNormalization", ["h3", "gain"], ["h4"]),
            helper.make_node("MatMul", ["h4", "last.weight"], ["y"]),
        ]
        value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["n", WIDTH])
        return Probe.of(save(tmp_path / "chain.onnx", nodes, [value("x")], [value("y")], weights, 23))

    return make


@pytest.mark.parametrize(
    ("gains", "weight"),
    [
        ({}, None),
        ({"a": 6e4}, "first"),
        ({"gate": 6e4}, "second"),
        ({"c": 6e4}, "last"),
        ({"a": 6e4, "c": 6e4}, "first"),
    ],
)
def test_the_first_weight_behind_which_values_are_not_finite(chain, gains, weight):
    probe = chain(**gains)
    x = np.linspace(1, 4, 2 * WIDTH, dtype=np.float16).reshape(2, WIDTH)
    results = probe.run({"x": x})
    assert probe.left_at == weight
    assert list(results) == ["y"] and [x.name for x in probe.outputs] == ["y"]


def test_only_the_last_run_counts(chain):
    probe = chain(a=100)
    probe.run({"x": np.full((1, WIDTH), 1e4, np.float16)})
    assert probe.left_at == "first"
    probe.run({"x": np.ones((1, WIDTH), np.float16)})
    assert probe.left_at is None
