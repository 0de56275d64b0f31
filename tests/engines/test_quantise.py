"""Quantised graphs of toy networks with sizes that no block divides, and what engines make of them."""

import tracemalloc

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from quantised import matrices, operators
from toy_graphs import NUMPY_TYPES, ONNX_TYPES, save

from infoprune_export.engines import onnxruntime, tensorrt
from infoprune_export.engines.graphs import read_graph
from infoprune_export.engines.onnxruntime import OrtEngine
from infoprune_export.engines.profiles import Profile, Span
from infoprune_export.engines.quantise import describe, quantise_graph, quantise_graphs
from infoprune_export.engines.whole_blocks import make_whole
from infoprune_export.errors import InputError

D_IN, RANK, D_OUT, VOCABULARY = 40, 7, 72, 37
PRODUCTS = {"first.weight": (D_IN, RANK), "second.weight": (RANK, D_OUT), "dense.weight": (D_OUT, 64), "lm_head.weight": (64, VOCABULARY)}


def network(path, dtype="fp32", seed=0):
    """A low-rank pair with a bias, a dense matrix, a norm and an output head on a table [vocabulary, 64]."""
    rng, element, port = np.random.default_rng(seed), NUMPY_TYPES[dtype], ONNX_TYPES[dtype]
    weights = {name: rng.standard_normal(shape) / np.sqrt(shape[0]) for name, shape in PRODUCTS.items() if name != "lm_head.weight"}
    weights |= {"table": rng.standard_normal((VOCABULARY, 64)), "bias": rng.standard_normal(D_OUT), "norm": np.ones(64)}
    weights = {name: w.astype(element) for name, w in weights.items()} | {"last": np.array(-1)}
    nodes = [
        helper.make_node("MatMul", ["inputs_embeds", "first.weight"], ["narrow"], name="a"),
        helper.make_node("MatMul", ["narrow", "second.weight"], ["wide"], name="b"),
        helper.make_node("Add", ["wide", "bias"], ["sum"], name="c"),
        helper.make_node("MatMul", ["sum", "dense.weight"], ["hidden"], name="d"),
        helper.make_node("Mul", ["hidden", "norm"], ["normed"], name="e"),
        helper.make_node("Gather", ["normed", "last"], ["row"], axis=1, name="f"),
        helper.make_node("Gemm", ["row", "table"], ["logits"], transB=1, name="g"),
    ]
    inputs = [helper.make_tensor_value_info("inputs_embeds", port, ["batch", "sequence", D_IN])]
    outputs = [helper.make_tensor_value_info("logits", port, ["batch", VOCABULARY])]
    return save(path, nodes, inputs, outputs, weights, 23)


def feeds(dtype="fp32"):
    return {"inputs_embeds": np.random.default_rng(1).standard_normal((2, 5, D_IN)).astype(NUMPY_TYPES[dtype])}


def run(path, dtype="fp32", **options):
    return OrtEngine.open(path, 1, ["CPUExecutionProvider"], **options).run(feeds(dtype))["logits"].astype(np.float32)


def by_hand(path):
    """Logits in float64, of the matrices that the graph dequantises: how two float32 sums are rounded is the processor's affair."""
    w = matrices(path)
    weights = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    hidden = (feeds()["inputs_embeds"].astype(np.float64) @ w["first.weight"] @ w["second.weight"] + weights["bias"]) @ w["dense.weight"]
    return hidden[:, -1] @ w["lm_head.weight"]


def off(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_every_matrix_is_quantised_and_nothing_else(tmp_path, weights):
    source = network(tmp_path / "float.onnx")
    quantise_graph(source, out := tmp_path / "small.onnx", weights)
    onnx.checker.check_model(str(out), full_check=True)
    assert {name: m.shape for name, m in matrices(out).items()} == PRODUCTS
    kept = {t.name: t for t in onnx.load(out).graph.initializer if not t.name.startswith(tuple(PRODUCTS))}
    assert set(kept) == {"bias", "norm", "last"}
    before = {t.name: t for t in onnx.load(source).graph.initializer}
    for name, tensor in kept.items():
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), numpy_helper.to_array(before[name]))
    assert off(run(out, optimise=False), by_hand(out)) < 1e-6  # eight roundings of float32; a processor takes three or four
    assert 0 < off(run(out, optimise=False), run(source)) < {"int4": 0.3, "int8": 0.02}[weights]


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_onnx_runtime_fuses_every_product(tmp_path, weights, dtype):
    """Half precision too, where a scale that is cast gives zeros."""
    quantise_graph(network(tmp_path / "float.onnx", dtype), out := tmp_path / "small.onnx", weights)
    engine = onnxruntime.build(out, tmp_path / "ort" / "small.onnx")
    found = operators(engine)
    assert found["MatMulNBits"] == len(PRODUCTS)
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & set(found)
    in_float = run(out, dtype, optimise=False)
    for other in (out, engine):
        assert off(run(other, dtype), in_float) < 0.03
    assert off(run(engine, dtype, optimise=False), in_float) < 0.03


def test_a_head_with_a_bias_keeps_it(tmp_path):
    path = network(tmp_path / "float.onnx")
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.arange(VOCABULARY, dtype=np.float32), "head.bias"))
    model.graph.node[-1].input.append("head.bias")
    onnx.save(model, path)
    quantise_graph(path, out := tmp_path / "small.onnx", "int8")
    assert off(run(out, optimise=False), run(path)) < 0.02
    np.testing.assert_allclose(run(out, optimise=False), by_hand(out) + np.arange(VOCABULARY), atol=1e-4)


def test_the_same_graph_gives_the_same_bytes(tmp_path):
    source = network(tmp_path / "float.onnx")
    files = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        quantise_graph(source, out := tmp_path / place / "small.onnx", "int4")
        files.append((out.read_bytes(), out.with_name("small.onnx_data").read_bytes()))
    assert files[0] == files[1]


def test_one_matrix_is_in_memory_at_a_time(tmp_path):
    count, side = 12, 512
    rng = np.random.default_rng(0)
    weights = {f"w{i}": rng.standard_normal((side, side)).astype(np.float32) for i in range(count)}
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"], name=f"m{i}") for i in range(count)]
    ports = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, ["n", side]) for i in (0, count)]
    source = save(tmp_path / "float.onnx", nodes, ports[:1], ports[1:], weights, 23)
    del weights
    tracemalloc.start()
    try:
        quantise_graph(source, tmp_path / "small.onnx", "int4")
        assert tracemalloc.get_traced_memory()[1] < count * side * side * 4 / 2
    finally:
        tracemalloc.stop()


def test_a_matrix_that_is_not_finite_is_named(tmp_path):
    model = onnx.load(network(tmp_path / "float.onnx"))
    dense = next(t for t in model.graph.initializer if t.name == "dense.weight")
    values = numpy_helper.to_array(dense).copy()
    values[3, 3] = np.inf
    dense.CopyFrom(numpy_helper.from_array(values, "dense.weight"))
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(InputError, match=r"broken.onnx: dense.weight: has weights that are NaN or infinite"):
        quantise_graph(tmp_path / "broken.onnx", tmp_path / "small.onnx", "int4")


def test_the_manifest_counts_what_is_quantised(tmp_path):
    for component in ("vision_encoder", "decoder_model_merged"):
        network(tmp_path / f"{component}.onnx")
    made = quantise_graphs(tmp_path, "fp32", "int4")
    assert [p.name for p in made] == ["vision_encoder_int8.onnx", "decoder_model_merged_q4.onnx"]
    found = describe(tmp_path, "fp32", "int4")
    assert (found.type, found.block_size) == ("int4", 32)
    counts = {name: tuple(c.model_dump().values()) for name, c in found.components.items()}
    parameters = sum(a * b for a, b in PRODUCTS.values())
    assert counts["vision_encoder"] == ("int8", 4, parameters, D_OUT + 64)
    assert counts["decoder_model_merged"] == ("int4", 4, parameters, D_OUT + 64)


# TensorRT


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_blocks_are_made_whole_and_the_weights_stay_the_same(tmp_path, weights):
    quantise_graph(network(tmp_path / "float.onnx"), out := tmp_path / "small.onnx", weights)
    model = read_graph(out)
    make_whole(model, tmp_path)
    onnx.save(model, tmp_path / "whole.onnx")
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    sizes = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            block = next(a.i for a in node.attribute if a.name == "block_size")
            (rows, _), (scales, _) = (shapes[name] for name in node.input)
            assert rows == block * scales and block > 1
            sizes[node.output[0]] = block
    # 40 inputs go in blocks of 8; 7, which only 1 divides, are padded to 32.
    assert sizes == {"first.weight": 8, "second.weight_padded": 32, "dense.weight": 8, "lm_head.weight": 32}
    np.testing.assert_array_equal(run(tmp_path / "whole.onnx", optimise=False), run(out, optimise=False))


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_tensorrt_takes_them_as_integers(tmp_path, weights, dtype):
    pytest.importorskip("tensorrt_rtx_bindings")
    axes = {"batch": Span(1, 1, 2), "sequence": Span(1, 4, 8), "past": Span(0, 0, 0)}

    def size(path):
        return tensorrt.build(path, tmp_path / "out", archs=["sm86"], profiles=[Profile("any", axes)])["sm86"].stat().st_size

    source = network(tmp_path / "float.onnx", dtype)
    quantise_graph(source, out := tmp_path / "small.onnx", weights)
    assert size(out) > 0  # uneven sizes build

    wide, side = tmp_path / "wide.onnx", 1024
    w = np.random.default_rng(0).standard_normal((D_IN, side)), np.random.default_rng(1).standard_normal((side, side))
    nodes = [helper.make_node("MatMul", ["inputs_embeds", "a"], ["x"]), helper.make_node("MatMul", ["x", "b"], ["y"])]
    inputs = [helper.make_tensor_value_info("inputs_embeds", ONNX_TYPES[dtype], ["batch", "sequence", D_IN])]
    outputs = [helper.make_tensor_value_info("y", ONNX_TYPES[dtype], ["batch", "sequence", side])]
    save(wide, nodes, inputs, outputs, {n: x.astype(NUMPY_TYPES[dtype]) for n, x in zip("ab", w, strict=True)}, 23)
    quantise_graph(wide, small := tmp_path / "wide_small.onnx", weights)
    saved = size(wide) - size(small)
    bits = {"fp32": 32, "fp16": 16}[dtype] - {"int4": 4, "int8": 8}[weights]
    assert saved > 0.7 * side * side * bits / 8
