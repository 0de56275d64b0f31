"""Operators of opset 23 written out in older ones, computed by ONNX Runtime, against the operators themselves."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from infoprune_export.engines.primitives import OPSET, write_out

TYPES = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16, bool: TensorProto.BOOL, np.int64: TensorProto.INT64}
BATCH, SEQUENCE, TOKENS, WIDTH = 2, 3, 5, 8


def one_node(operator, arrays, axes, **attributes):
    """A model of one node; batch and lengths are dynamic."""
    inputs = [helper.make_tensor_value_info(n, TYPES[a.dtype.type if a.dtype != bool else bool], axes[n]) for n, a in arrays.items()]
    output = helper.make_tensor_value_info("y", inputs[0].type.tensor_type.elem_type, axes[next(iter(arrays))])
    graph = helper.make_graph([helper.make_node(operator, list(arrays), ["y"], **attributes)], "g", inputs, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def computed(model, arrays):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    (y,) = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, arrays)
    return y


def assert_the_same(operator, arrays, axes, tolerance, **attributes):
    model = one_node(operator, arrays, axes, **attributes)
    expected = computed(model, arrays)
    assert write_out(model, lambda name: name != operator) == {operator}
    onnx.checker.check_model(model, full_check=True)
    assert operator not in {n.op_type for n in model.graph.node} and model.opset_import[0].version == OPSET
    found = computed(model, arrays)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), atol=tolerance, rtol=tolerance)


def normal(*shape, dtype=np.float32, scale=1.0):
    return (scale * np.random.default_rng(len(shape)).normal(size=shape)).astype(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float16, 2e-3)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [6, 3, 1])
def test_attention(groups, masked, dtype, tolerance):
    """As many groups as heads, fewer, and one; every position sees itself, padding sees nothing else."""
    arrays = {
        "q": normal(BATCH, 6, SEQUENCE, WIDTH, dtype=dtype),
        "k": normal(BATCH, groups, TOKENS, WIDTH, dtype=dtype),
        "v": normal(BATCH, groups, TOKENS, WIDTH, dtype=dtype),
    }
    axes = {"q": ["b", 6, "s", WIDTH], "k": ["b", groups, "t", WIDTH], "v": ["b", groups, "t", WIDTH], "mask": ["b", 1, "s", "t"]}
    if masked:
        mask = np.broadcast_to(np.arange(TOKENS) <= np.arange(SEQUENCE)[:, None] + TOKENS - SEQUENCE, (BATCH, 1, SEQUENCE, TOKENS)).copy()
        mask[1, :, :, :2] = False
        arrays["mask"] = mask
    assert_the_same("Attention", arrays, axes, tolerance, **({"scale": 0.3} if groups == 3 else {}))


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float16, 2e-3)])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_rms_normalization_does_not_overflow(scale, dtype, tolerance):
    """300 squared is more than float16 holds."""
    arrays = {"x": normal(BATCH, SEQUENCE, WIDTH, dtype=dtype, scale=scale), "w": normal(WIDTH, dtype=dtype)}
    assert_the_same("RMSNormalization", arrays, {"x": ["b", "s", WIDTH], "w": [WIDTH]}, tolerance, axis=-1, epsilon=1e-5, stash_type=1)


def test_rotary_embedding():
    half = {name: normal(BATCH, SEQUENCE, WIDTH // 2) for name in ("cos", "sin")}
    axes = {"x": ["b", 4, "s", WIDTH], **{name: ["b", "s", WIDTH // 2] for name in half}}
    assert_the_same("RotaryEmbedding", {"x": normal(BATCH, 4, SEQUENCE, WIDTH), **half}, axes, 1e-6)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate):
    assert_the_same("Gelu", {"x": normal(BATCH, WIDTH, scale=3.0)}, {"x": ["b", WIDTH]}, 1e-6, approximate=approximate)


def test_what_the_parser_reads_stays():
    model = one_node("Gelu", {"x": normal(BATCH, WIDTH)}, {"x": ["b", WIDTH]})
    before = model.SerializeToString()
    assert write_out(model, lambda name: True) == set() and model.SerializeToString() == before


def attention_of(axes, mask=None, **attributes):
    arrays = {n: normal(*(BATCH if isinstance(a, str) else a for a in axes)) for n in "qkv"}
    if mask is not None:
        arrays["mask"] = mask
    named = {**{n: axes for n in "qkv"}, **({} if mask is None else {"mask": list(mask.shape)})}
    return one_node("Attention", arrays, named, **attributes)


HEADS = ["b", 2, "s", WIDTH]
SQUARE = (BATCH, BATCH)


@pytest.mark.parametrize(
    "model",
    [
        attention_of(HEADS, is_causal=1),
        attention_of(HEADS, softcap=20.0),
        attention_of(["b", "s", 2 * WIDTH], q_num_heads=2, kv_num_heads=2),
        attention_of(["b", "heads", "s", WIDTH]),
        attention_of(HEADS, np.zeros((BATCH, 1, *SQUARE), np.float32)),  # added to the scores
        attention_of(HEADS, np.ones(SQUARE, bool)),
        attention_of(HEADS, np.ones((BATCH, 2, *SQUARE), bool)),  # another one for every head
    ],
    ids=["causal", "capped", "3d", "unknown-heads", "added-mask", "2d-mask", "mask-of-heads"],
)
def test_a_form_that_no_graph_here_has_stays_for_the_parser_to_name(model):
    before = model.SerializeToString()
    assert write_out(model, lambda name: False) == set() and model.SerializeToString() == before


def test_a_parser_that_reads_some_of_opset_23_gets_a_graph_of_it():
    """As that of TensorRT 10.14: Attention is read, RMSNormalization is not."""
    attention = attention_of(HEADS)
    weight = helper.make_tensor("w", TensorProto.FLOAT, [WIDTH], np.ones(WIDTH))
    attention.graph.initializer.append(weight)
    attention.graph.node.append(helper.make_node("RMSNormalization", ["q", "w"], ["normed"], axis=-1))
    assert write_out(attention, lambda name: name == "Attention") == {"RMSNormalization"}
    assert attention.opset_import[0].version == 23
    onnx.checker.check_model(attention, full_check=True)
