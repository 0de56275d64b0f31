"""ONNX graphs on disk as an engine builder needs them: structure in memory, weights left in their files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from infoprune_export.bundle import inside
from infoprune_export.errors import InputError


def read_graph(path: Path) -> onnx.ModelProto:
    """Reads a graph without its external weights.

    Raises:
        InputError: not an ONNX file, or external data that is missing, too short or outside the graph's directory.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as e:  # protobuf raises types of its own
        raise InputError(f"cannot be read as ONNX ({_first_line(e)})", where=path, mend="export it again") from None
    _check_external_data(model, path)
    return model


def external_files(model: onnx.ModelProto, path: Path) -> list[Path]:
    """The files that hold the weights of a graph, sorted, each inside the graph's directory.

    Raises:
        InputError: for a location that leaves the directory.
    """
    locations = {external_entries(t).get("location", "") for t in _constants(model) if is_external(t)}
    return [inside(path.parent, location, path) for location in sorted(locations)]


def weight_bytes(model: onnx.ModelProto, path: Path) -> int:
    """Bytes of all weights of a graph, in the graph file and outside it."""
    return path.stat().st_size + sum(file.stat().st_size for file in external_files(model, path))


def read_tensor(tensor: onnx.TensorProto, directory: Path) -> np.ndarray:
    """A tensor's values, left in their file where they are in one and its elements are bytes or more."""
    dtype, shape = helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
    if not is_external(tensor):
        return numpy_helper.to_array(tensor)
    if tensor.data_type == onnx.TensorProto.INT4:  # two in a byte
        return numpy_helper.to_array(tensor, str(directory))
    entries = external_entries(tensor)
    return np.memmap(directory / entries["location"], dtype, mode="r", offset=int(entries.get("offset", 0)), shape=shape)


def quantised_with(model: onnx.ModelProto) -> int | None:
    """ONNX type of the scales of a graph's block-wise quantised matrices; None where it has none."""
    types = {t.name: t.data_type for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and any(a.name == "block_size" for a in node.attribute):
            return types.get(node.input[1])
    return None


def _check_external_data(model: onnx.ModelProto, path: Path) -> None:
    sizes = {}
    for file in external_files(model, path):
        if not file.is_file():
            raise InputError(f"its weights file {file.name} is missing", where=path, mend="keep a graph and its data file together")
        sizes[file] = file.stat().st_size
    for tensor in _constants(model):
        if is_external(tensor):
            entries = external_entries(tensor)
            file = path.parent / entries["location"]
            offset, length = (entries.get(key, "0") for key in ("offset", "length"))
            if not (offset.isdecimal() and length.isdecimal()):
                raise InputError(f"weight {tensor.name!r} has no valid offset and length", where=path, mend="export it again")
            if int(offset) + int(length) > sizes[file]:
                raise InputError(
                    f"weight {tensor.name!r} lies beyond the end of {file.name}", where=path, mend="the file was cut: export it again"
                )


def _constants(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every constant of a model, its local functions included."""
    yield from _tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every constant of a graph and of the graphs inside its nodes."""
    yield from graph.initializer
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in [attribute.g, *attribute.graphs] if attribute.HasField("g") or attribute.graphs else []:
                yield from _tensors(inner)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's values lie in a file beside the graph's own."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def external_entries(tensor: onnx.TensorProto) -> dict[str, str]:
    """`location`, `offset` and `length` of a tensor in another file."""
    return {entry.key: entry.value for entry in tensor.external_data}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
