"""Toy graphs with the names and axes of the three components."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HIDDEN, GROUPS, HEAD_DIM, VOCABULARY = 32, 2, 16, 40
ONNX_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}
NUMPY_TYPES = {"fp32": np.float32, "fp16": np.float16}


def save(path: Path, nodes: list, inputs: list, outputs: list, weights: dict[str, np.ndarray], opset: int) -> Path:
    """Writes a graph with its weights in `<path>_data`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, [numpy_helper.from_array(w, name) for name, w in weights.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}_data", size_threshold=256)
    return path


def vision_encoder(path: Path, dtype: str = "fp32") -> Path:
    t = ONNX_TYPES[dtype]
    kernel = np.random.default_rng(0).normal(size=(HIDDEN, 3, 4, 4)).astype(NUMPY_TYPES[dtype])
    nodes = [
        helper.make_node("Conv", ["pixel_values", "kernel"], ["patches"], strides=[4, 4]),
        helper.make_node("Reshape", ["patches", "shape"], ["columns"]),
        helper.make_node("Transpose", ["columns"], ["image_features"], perm=[0, 2, 1]),
    ]
    inputs = [helper.make_tensor_value_info("pixel_values", t, ["images", 3, 8, 8])]
    outputs = [helper.make_tensor_value_info("image_features", t, ["images", 4, HIDDEN])]
    return save(path, nodes, inputs, outputs, {"kernel": kernel, "shape": np.array([0, HIDDEN, 4])}, 18)


def embed_tokens(path: Path, dtype: str = "fp32") -> Path:
    table = np.random.default_rng(1).normal(size=(VOCABULARY, HIDDEN)).astype(NUMPY_TYPES[dtype])
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"])]
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])]
    outputs = [helper.make_tensor_value_info("inputs_embeds", ONNX_TYPES[dtype], ["batch", "sequence", HIDDEN])]
    return save(path, nodes, inputs, outputs, {"table": table}, 18)


def decoder(path: Path, dtype: str = "fp32", opset: int = 23) -> Path:
    """One layer of attention with a cache: an Attention node in opset 23, smaller operations in opset 18."""
    t, n = ONNX_TYPES[dtype], NUMPY_TYPES[dtype]
    rng = np.random.default_rng(2)
    weights = {f"w{x}": rng.normal(scale=0.1, size=(HIDDEN, HIDDEN)).astype(n) for x in "qkv"}
    weights |= {"head": rng.normal(size=(HIDDEN, VOCABULARY)).astype(n), "split": np.array([0, 0, GROUPS, HEAD_DIM])}
    weights |= {"join": np.array([0, 0, HIDDEN]), "last": np.array([-1]), "scale": np.array(HEAD_DIM**-0.5, n), "axes": np.array([1, 2])}
    nodes = []
    for x in "qkv":
        nodes += [
            helper.make_node("MatMul", ["inputs_embeds", f"w{x}"], [f"{x}0"]),
            helper.make_node("Reshape", [f"{x}0", "split"], [f"{x}1"]),
            helper.make_node("Transpose", [f"{x}1"], [x], perm=[0, 2, 1, 3]),
        ]
    for x, name in (("k", "key"), ("v", "value")):
        nodes.append(helper.make_node("Concat", [f"past_key_values.0.{name}", x], [f"present.0.{name}"], axis=2))
    nodes.append(helper.make_node("Cast", ["attention_mask"], ["visible"], to=TensorProto.BOOL))
    nodes.append(helper.make_node("Unsqueeze", ["visible", "axes"], ["mask"]))
    if opset >= 23:
        nodes.append(helper.make_node("Attention", ["q", "present.0.key", "present.0.value", "mask"], ["y0"], name="attention_0"))
    else:
        weights["never"] = np.array(-1e4, n)
        nodes += [
            helper.make_node("Transpose", ["present.0.key"], ["kt"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", ["q", "kt"], ["s0"]),
            helper.make_node("Mul", ["s0", "scale"], ["s1"]),
            helper.make_node("Where", ["mask", "s1", "never"], ["s2"]),
            helper.make_node("Softmax", ["s2"], ["s3"]),
            helper.make_node("MatMul", ["s3", "present.0.value"], ["y0"]),
        ]
    nodes += [
        helper.make_node("Transpose", ["y0"], ["y1"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["y1", "join"], ["y2"]),
        helper.make_node("Gather", ["y2", "last"], ["y3"], axis=1),
        helper.make_node("MatMul", ["y3", "head"], ["logits"]),
    ]
    cache = [f"0.{name}" for name in ("key", "value")]
    inputs = [
        helper.make_tensor_value_info("inputs_embeds", t, ["batch", "sequence", HIDDEN]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "past + sequence"]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "sequence"]),
        *(helper.make_tensor_value_info(f"past_key_values.{c}", t, ["batch", GROUPS, "past", HEAD_DIM]) for c in cache),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", t, ["batch", 1, VOCABULARY]),
        *(helper.make_tensor_value_info(f"present.{c}", t, ["batch", GROUPS, "past + sequence", HEAD_DIM]) for c in cache),
    ]
    return save(path, nodes, inputs, outputs, weights, opset)


def write_graphs(root: Path, dtype: str = "fp32") -> None:
    suffix = "" if dtype == "fp32" else f"_{dtype}"
    vision_encoder(root / "onnx" / f"vision_encoder{suffix}.onnx", dtype)
    embed_tokens(root / "onnx" / f"embed_tokens{suffix}.onnx", dtype)
    decoder(root / "onnx" / f"decoder_model_merged{suffix}.onnx", dtype)
