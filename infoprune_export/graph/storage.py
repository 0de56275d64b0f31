"""Graphs on disk: the structure in `<graph>.onnx`, the weights in one file `<graph>_data` beside it.

The same model gives the same bytes: nothing that depends on the clock, the machine or the directory is written.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from infoprune_export import __version__

SITES_KEY = "infoprune_export.sites"
"""Metadata of a graph: site -> {"weight": initialiser names in data order, "bias": name or null, "transposed": true}.

Transposed weights are [d_in, d_out], the transpose of PyTorch's. In a quantised graph, names of what it dequantises to."""
PROJECTOR_KEY = "infoprune_export.projector"
"""Metadata of the vision graph: names of the projector's weights."""
INLINE_BYTES = 1024
"""Tensors up to this size stay in the graph's own file."""
ALIGNMENT = 4096
"""Offset granularity of the weight file, a memory page, so that engines can map it."""

Shared = Mapping[str, ir.ExternalTensor]
"""Initialiser name to a tensor that another graph's weight file holds already."""


def data_file(graph: Path) -> Path:
    """The file that holds a graph's weights."""
    return graph.with_name(graph.name + "_data")


def save_graph(model: ir.Model, path: Path, shared: Shared | None = None) -> dict[str, ir.ExternalTensor]:
    """Writes a graph and its weights.

    Args:
        model: The graph; its large initialisers are turned into references to the written file.
        path: The .onnx file; the weight file is written beside it, unless all weights are small or shared.
        shared: Weights to refer to where another graph in the same directory stores them.

    Returns:
        The written tensors by initialiser name.
    """
    shared = shared or {}
    written: dict[str, ir.ExternalTensor] = {}
    data = data_file(path)
    data.unlink(missing_ok=True)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if name in shared:
            value.const_value = shared[name]
        elif tensor.nbytes > INLINE_BYTES and tensor.dtype.is_floating_point():
            value.const_value = written[name] = _append(tensor, name, data)
    model.producer_name, model.producer_version = "infoprune-export", __version__
    proto = ir.to_proto(model)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return written


def load_graph(path: Path) -> onnx.ModelProto:
    """The structure of a graph, without its weights.

    Raises:
        InputError: the file is missing or no ONNX graph.
    """
    from google.protobuf.message import DecodeError

    from infoprune_export.errors import InputError

    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as e:
        raise InputError(f"is not a readable ONNX graph ({e})", where=path, mend="export it again") from None


def metadata(model: onnx.ModelProto, key: str, default: Any) -> Any:
    """A JSON entry of a graph's metadata."""
    return next((json.loads(p.value) for p in model.metadata_props if p.key == key), default)


def set_metadata(model: onnx.ModelProto, kept: Mapping[str, str], entries: Mapping[str, Any]) -> None:
    """Gives a graph the metadata `kept`, as text, and `entries`, as JSON."""
    onnx.helper.set_model_props(model, {**kept, **{key: json.dumps(value) for key, value in entries.items()}})


def weight_files(model: onnx.ModelProto) -> dict[str, str]:
    """Initialiser name to the file that holds it, of those outside the graph's own file."""
    return {
        t.name: next(e.value for e in t.external_data if e.key == "location")
        for t in model.graph.initializer
        if t.data_location == onnx.TensorProto.EXTERNAL
    }


def _append(tensor: ir.TensorProtocol, name: str, data: Path) -> ir.ExternalTensor:
    data.touch()
    with open(data, "r+b") as f:  # not "ab": where files are copied inside the kernel, none may be open for appending
        f.seek(0, io.SEEK_END)
        f.write(b"\0" * (-f.tell() % ALIGNMENT))
        offset = f.tell()
        f.flush()  # a tensor may write past the buffer
        tensor.tofile(f)
    return ir.ExternalTensor(data.name, offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name, base_dir=data.parent)
