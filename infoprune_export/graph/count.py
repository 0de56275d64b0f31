"""FLOPs counted on exported graphs, from their shapes alone; the weights are not read.

One multiply-accumulate is 2 FLOPs; matrix products, convolutions and attention scores (in full) count, everything
else does not. `models.flops` predicts the same numbers from a plan; the two agree exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import onnx

from infoprune_export.bundle import DECODER, VISION, graph_file
from infoprune_export.errors import InputError
from infoprune_export.graph.storage import PROJECTOR_KEY, load_graph, metadata
from infoprune_export.precision import Precision
from infoprune_export.recipe import Workload

UNCOUNTABLE = {
    "ConvTranspose", "ConvInteger", "DeformConv", "Einsum", "GRU", "GroupQueryAttention", "If", "LSTM", "Loop", "MatMulInteger",
    "MatMulNBits", "MultiHeadAttention", "QLinearConv", "QLinearMatMul", "RNN", "Scan",
}  # fmt: skip
"""Operators that multiply matrices or hide others that do, and that no graph of ours contains: refused, not taken for 0."""

Shapes = dict[str, tuple[int, ...]]


def count_graph(path: Path, dims: Mapping[str, int]) -> int:
    """FLOPs of one run of a graph.

    Args:
        path: The .onnx file.
        dims: Size of every dynamic axis of the inputs, by its name: `batch`, `sequence`, `past`, `past + sequence`, `images`.

    Raises:
        InputError: naming the node whose shape is unknown or whose operator cannot be counted, or the axis without a size.
    """
    return sum(count_nodes(path, dims).values())


def count_nodes(path: Path, dims: Mapping[str, int]) -> dict[str, int]:
    """FLOPs of every counted node of a graph: the name of its weight, or its own where it has none, to FLOPs."""
    model = load_graph(path)
    if model.functions:
        raise InputError(f"has functions ({model.functions[0].name}), which are not counted", where=path, mend="inline them first")
    shapes = _shapes(model, dims, path)
    weights = {i.name for i in model.graph.initializer}
    weights |= {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights}
    counted: dict[str, int] = {}
    for node in model.graph.node:
        flops = _node_flops(node, shapes, path)
        if flops:
            key = next((i for i in node.input if i in weights), node.name or node.output[0])
            counted[key] = counted.get(key, 0) + flops
    return counted


def count_bundle(onnx_dir: Path, workload: Workload, dtype: Precision = "fp32") -> dict[str, int]:
    """FLOPs of one request (all of its batch) through a directory of exported graphs.

    Returns:
        `vision`, `projector`, `prefill`, `decode` and their `total`.
    """
    vision = projector = 0
    if images := workload.batch * workload.images:
        path = onnx_dir / graph_file(VISION, dtype)
        nodes = count_nodes(path, {"images": images})
        projector = sum(nodes.get(weight, 0) for weight in metadata(load_graph(path), PROJECTOR_KEY, []))
        vision = sum(nodes.values()) - projector
    decoder = onnx_dir / graph_file(DECODER, dtype)

    def run(sequence: int, past: int) -> int:
        dims = {"batch": workload.batch, "sequence": sequence, "past": past, "past + sequence": past + sequence}
        return count_graph(decoder, dims)

    prompt, steps = workload.prompt_tokens, workload.new_tokens - 1
    # One token's work grows by the same amount with every token of past: first and last step give the sum of all.
    decode = steps * (run(1, prompt) + run(1, prompt + steps - 1)) // 2 if steps else 0
    parts = {"vision": vision, "projector": projector, "prefill": run(prompt, 0), "decode": decode}
    return {**parts, "total": sum(parts.values())}


def _node_flops(node: onnx.NodeProto, shapes: Shapes, path: Path) -> int:
    where = f"{path}: node {node.name or node.output[0]} ({node.op_type})"

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise InputError(f"shape of {name!r} is unknown, so its FLOPs are", where=where)
        return shapes[name]

    if node.op_type in UNCOUNTABLE or any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
        raise InputError("operator cannot be counted", where=where)
    if node.op_type == "MatMul":
        a, y = shape(node.input[0]), shape(node.output[0])
        return 2 * prod(y) * a[-1]
    if node.op_type == "Gemm":
        a, y = shape(node.input[0]), shape(node.output[0])
        transposed = any(x.name == "transA" and x.i for x in node.attribute)
        return 2 * prod(y) * a[0 if transposed else 1]
    if node.op_type == "Conv":
        weight, y = shape(node.input[1]), shape(node.output[0])
        return 2 * prod(y) * prod(weight[1:])
    if node.op_type == "Attention":
        q, k, v = (shape(name) for name in node.input[:3])
        if len(q) != 4 or len(node.input) > 4:
            raise InputError("attention is counted with 4-D inputs and its past concatenated before", where=where)
        batch, heads, queries, head_dim = q
        return 2 * batch * heads * queries * k[2] * (head_dim + v[3])
    if node.domain not in ("", "ai.onnx"):
        raise InputError(f"operator of domain {node.domain!r} cannot be counted", where=where)
    return 0


def _shapes(model: onnx.ModelProto, dims: Mapping[str, int], path: Path) -> Shapes:
    """Every tensor's shape once the dynamic axes have sizes."""
    for port in model.graph.input:
        for d in port.type.tensor_type.shape.dim:
            if d.dim_param:
                if d.dim_param not in dims:
                    raise InputError(f"no size is given for axis {d.dim_param!r} of {port.name}", where=path)
                d.dim_value = dims[d.dim_param]
    for port in model.graph.output:  # inferred again below
        port.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    try:
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as e:
        raise InputError(f"shapes do not fit ({str(e).splitlines()[0]})", where=path) from None
    shapes: Shapes = {i.name: tuple(i.dims) for i in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        shape = value.type.tensor_type.shape
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in shape.dim):
            shapes[value.name] = tuple(d.dim_value for d in shape.dim)
    return shapes
