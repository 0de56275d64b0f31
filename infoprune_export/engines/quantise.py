"""Graphs with quantised matrices, from a bundle's float graphs: standard ONNX, without PyTorch, a matrix in memory at a time.

The weight `w` of MatMul(x, w) becomes DequantizeLinear(w_quantized, w_scale), blocked along the inputs. ONNX Runtime makes one
MatMulNBits of the two nodes, TensorRT keeps the integers and dequantises on the fly; any other runtime multiplies in float.

What stays float: norms, biases, the convolution that cuts an image into patches, positions and class token, and the table of
embeddings, of which a token reads one row, and which a portable graph would dequantise whole for it. An output head that shares
that table gets a quantised copy of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import helper

from infoprune_export.bundle import DECODER, VISION, QuantisedComponent, QuantisedWeights, component_precision, graph_file
from infoprune_export.engines.blocks import BLOCK, pack, quantise
from infoprune_export.engines.graphs import is_external, read_graph, read_tensor
from infoprune_export.errors import InputError
from infoprune_export.precision import Dtype, WeightType, quantised, weights_of

QUANTISED = (VISION, DECODER)
"""Components with matrices; the embedding is a table."""
INLINE_BYTES = 1024
"""Tensors up to this size stay in the graph's own file."""
PAGE, PAGE_FROM, WORD = 4096, 2**20, 64
"""Tensors from a MiB on begin at a memory page, smaller ones at a multiple of 64 bytes: they are many, and their sizes small."""
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_INTEGERS = {"int4": onnx.TensorProto.INT4, "int8": onnx.TensorProto.INT8}
INT4_IR_VERSION = 10
CODES, SCALE = "_quantized", "_scale"
"""What ONNX Runtime's quantiser appends to the name of a weight, too."""
HEAD = "lm_head.weight"
"""Name of the copy of the embedding's table that an output head gets."""


def quantise_graphs(onnx_dir: Path, dtype: Dtype, weights: WeightType) -> list[Path]:
    """Writes the quantised graphs of a network beside its float ones.

    Args:
        onnx_dir: Directory with the graphs.
        dtype: Of the float graphs, and of all in the new ones that is not quantised.
        weights: `int8`, or `int4`, of which the vision encoder takes int8 (see `bundle.component_precision`).

    Returns:
        The graphs written.

    Raises:
        InputError: a graph is missing, or a weight is not finite.
    """
    made = []
    for component in QUANTISED:
        own = component_precision(component, quantised(dtype, weights))
        out = onnx_dir / graph_file(component, own)
        quantise_graph(onnx_dir / graph_file(component, dtype), out, weights_of(own))
        made.append(out)
    return made


def quantise_graph(graph: Path, out: Path, weights: WeightType) -> None:
    """Writes one graph with its matrices quantised; see the top of this module.

    Args:
        graph: The float graph.
        out: File to write, its weights beside it in `<out>_data`.
        weights: `int4` or `int8`.

    Raises:
        InputError: the graph cannot be read, or a weight is not finite.
    """
    model = read_graph(graph)
    matrices = _matrices(model)
    used = {name for node in model.graph.node for name in node.input}
    stored = {t.name: t for t in model.graph.initializer}
    kept: list[onnx.TensorProto] = []
    data = out.with_name(f"{out.name}_data")
    for file in (out, data):  # which may be links to another bundle's
        file.unlink(missing_ok=True)
    with open(data, "wb") as file:
        for name, tensor in stored.items():
            if name in matrices or name not in used:
                continue
            values = read_tensor(tensor, graph.parent)
            kept.append(_tensor(name, tensor.data_type, values.shape, values.tobytes(), file) if is_external(tensor) else tensor)
        for name, matrix in matrices.items():
            values = read_tensor(stored[matrix.initialiser], graph.parent)
            try:
                codes, scales = quantise(values.T if matrix.transposed else values, weights)
            except InputError as e:
                raise InputError(e.what, where=f"{graph}: {name}", mend=e.mend) from None
            kept.append(_tensor(f"{name}{CODES}", _INTEGERS[weights], codes.shape, pack(codes, weights), file))
            kept.append(_tensor(f"{name}{SCALE}", stored[matrix.initialiser].data_type, scales.shape, scales.tobytes(), file))
    _replace(model.graph.initializer, kept)
    _replace(model.graph.node, list(_dequantised(model.graph.node, set(matrices))))
    model.ir_version = max(model.ir_version, INT4_IR_VERSION)
    out.write_bytes(model.SerializeToString(deterministic=True))


def describe(onnx_dir: Path, dtype: Dtype, weights: WeightType) -> QuantisedWeights:
    """What is quantised and what is not, as the graphs on disk say it, for the manifest."""
    components = {}
    for component in QUANTISED:
        own = component_precision(component, quantised(dtype, weights))
        model = read_graph(onnx_dir / graph_file(component, own))
        sizes = {t.name: int(np.prod(t.dims)) for t in model.graph.initializer}
        floats = sum(sizes[t.name] for t in model.graph.initializer if t.data_type in _FLOATS)
        inputs = [node.input for node in model.graph.node if node.op_type == "DequantizeLinear"]
        components[component] = QuantisedComponent(
            type=weights_of(own),
            matrices=len(inputs),
            parameters=sum(sizes[codes] for codes, _ in inputs),
            float_parameters=floats - sum(sizes[scale] for _, scale in inputs),
        )
    return QuantisedWeights(type=weights, block_size=BLOCK, components=components)


@dataclass(frozen=True)
class _Matrix:
    """Where a matrix to quantise is stored, and whether as [d_out, d_in]."""

    initialiser: str
    transposed: bool = False


def _matrices(model: onnx.ModelProto) -> dict[str, _Matrix]:
    """Names that matrix products read to the matrices behind them; a head on the embedding's table becomes such a product."""
    nodes, floats = [], {t.name for t in model.graph.initializer if t.data_type in _FLOATS and len(t.dims) == 2}
    found: dict[str, _Matrix] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in floats:
            found[node.input[1]] = _Matrix(node.input[1])
        if node.op_type == "Gemm" and node.input[1] in floats and any(a.name == "transB" and a.i for a in node.attribute):
            found[HEAD] = _Matrix(node.input[1], transposed=True)
            nodes += _as_product(node)
        else:
            nodes.append(node)
    _replace(model.graph.node, nodes)
    return found


def _as_product(gemm: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Gemm(x, table, bias) with a transposed table as a product with a matrix [d_in, d_out], and the sum."""
    x, _, *bias = gemm.input
    product = f"{gemm.output[0]}_product" if bias else gemm.output[0]
    made = [helper.make_node("MatMul", [x, HEAD], [product], name=gemm.name)]
    return [*made, helper.make_node("Add", [product, *bias], list(gemm.output), name=f"{gemm.name}_bias")] if bias else made


def _dequantised(nodes: Iterable[onnx.NodeProto], matrices: set[str]) -> Iterator[onnx.NodeProto]:
    """The nodes, and before the first reader of each matrix the one that makes it: not all at once, which would hold them all."""
    made: set[str] = set()
    for node in nodes:
        for name in node.input:
            if name in matrices - made:
                made.add(name)
                inputs = [f"{name}{CODES}", f"{name}{SCALE}"]
                yield helper.make_node("DequantizeLinear", inputs, [name], name=f"DequantizeLinear_{name}", axis=0, block_size=BLOCK)
        yield node


def _tensor(name: str, data_type: int, shape: Sequence[int], raw: bytes, file: BinaryIO) -> onnx.TensorProto:
    """A tensor whose values go to the end of the weight file, or stay with it where they are few."""
    tensor = onnx.TensorProto(name=name, data_type=data_type, dims=shape)
    if len(raw) <= INLINE_BYTES:
        tensor.raw_data = raw
        return tensor
    file.write(b"\0" * (-file.tell() % (PAGE if len(raw) >= PAGE_FROM else WORD)))
    place = {"location": Path(file.name).name, "offset": file.tell(), "length": len(raw)}
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=str(value)) for key, value in place.items())
    file.write(raw)
    return tensor


def _replace(field: Any, values: Sequence[Any]) -> None:
    """Gives a repeated field new contents."""
    values = list(values)
    del field[:]
    field.extend(values)
