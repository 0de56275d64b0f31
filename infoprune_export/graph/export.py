"""PyTorch to ONNX: traces the three components and writes them with the names other tools expect."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import onnxscript.rewriter
import torch
from onnx_ir.passes import common as passes
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype
from onnxscript.rewriter import onnx_fusions
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from transformers import PreTrainedModel

from infoprune_export.bundle import COMPONENTS, DECODER, EMBED, VISION, graph_file
from infoprune_export.errors import InputError
from infoprune_export.graph.components import OPSET, Component, split
from infoprune_export.graph.fusions import fuse_rotary
from infoprune_export.graph.storage import PROJECTOR_KEY, SITES_KEY, Shared, save_graph
from infoprune_export.graph.working_type import ONNX_TYPES, STAND_IN, in_type
from infoprune_export.models.anatomy import ATTENTION_ROLES, Anatomy, site
from infoprune_export.precision import Dtype


@dataclass(frozen=True)
class Port:
    """Name, shape and type of a graph's input or output; a dynamic axis has a name, and the graph's own type is the stand-in."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype = STAND_IN

    def sample(self, sizes: dict[str, int]) -> torch.Tensor:
        return torch.zeros([sizes[d] if isinstance(d, str) else d for d in self.shape], dtype=self.dtype)

    @property
    def dynamic(self) -> dict[int, Any]:
        return {i: Dim.DYNAMIC for i, d in enumerate(self.shape) if isinstance(d, str)}


@dataclass(frozen=True)
class Ports:
    inputs: list[Port]
    outputs: list[Port]


SAMPLE = {"images": 2, "batch": 2, "sequence": 3, "past": 4, "past + sequence": 7}
"""Sizes to trace with; every one above 1, because the tracer takes 0 and 1 for constants."""


def export_graphs(model: PreTrainedModel, anatomy: Anatomy, out_dir: Path, *dtypes: Dtype) -> None:
    """Writes the three graphs of a model, original or compressed, named as `bundle.graph_file` says.

    Args:
        model: The PyTorch model, laid out or on the CPU; it is not changed. Weights are read one by one, when they are written.
        anatomy: Of the original.
        out_dir: Directory for the graphs, made if needed.
        dtypes: Types of weights, activations, cache and logits, each a set of graphs from the same trace; fp32 when none is given.
            Softmax, norms and positions compute in fp32 inside.

    Raises:
        InputError: the model has something that no graph can express, or that the exporter cannot trace.
    """
    modules, ports = split(model, anatomy), _ports(model, anatomy)
    out_dir.mkdir(parents=True, exist_ok=True)
    tables: dict[Dtype, Shared] = {}
    for component in COMPONENTS:
        module = modules.pop(component)
        traced = trace(module, ports[component])
        for dtype in dtypes or ("fp32",):
            graph = in_type(traced, dtype)
            _name_weights(graph, module, partial(_weight, model))
            with _quiet():
                _simplify(graph)
            _name_ports(graph, ports[component], dtype)
            _describe_sites(graph, anatomy)
            written = save_graph(graph, out_dir / graph_file(component, dtype), tables.get(dtype))
            if component == EMBED:  # a tied output head refers to the embedding's file
                tables[dtype] = written


def trace(module: Component, ports: Ports) -> ir.Model:
    """One component as an ONNX graph in the stand-in type, its weights without contents.

    Args:
        module: From `split`, without weights.
        ports: Its inputs and outputs.
    """
    flat = [port.sample(SAMPLE) for port in ports.inputs]
    dynamic = [port.dynamic for port in ports.inputs]
    args = _nested(flat) if len(flat) > 1 else tuple(flat)
    shapes = _nested(dynamic) if len(flat) > 1 else tuple(dynamic)
    with _quiet():
        try:
            with _pretending(module):
                program = torch.export.export(module, args, dynamic_shapes=shapes, strict=False)
            graph = torch.onnx.export(program, opset_version=OPSET, optimize=False, verbose=False).model
        except Exception as e:  # tracing raises anything from TypeError to errors of its own
            what = f"PyTorch's exporter cannot trace it ({(str(e).splitlines() or [type(e).__name__])[0]})"
            raise InputError(what, where=type(module).__name__, mend="run again with -vv for the exporter's own report") from e
    for name in module.weights():
        if name in graph.graph.initializers:
            graph.graph.initializers[name].const_value = None
    passes.InlinePass()(graph)
    return graph


def _nested(flat: list) -> tuple:
    """The decoder's arguments: three tensors and a list of key-value pairs."""
    return (*flat[:3], list(zip(flat[3::2], flat[4::2], strict=True)))


def _ports(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, Ports]:
    geometry, hidden = anatomy.geometry, anatomy.language.hidden
    pixels = ("images", geometry.channels, geometry.image_size, geometry.image_size)
    past, present = [], []
    for layer in anatomy.language.layers:
        head_dim = layer.attention.head_dim
        groups = model.get_submodule(layer.attention.k.path).out_features // head_dim
        for name in ("key", "value"):
            past.append(Port(f"past_key_values.{layer.index}.{name}", ("batch", groups, "past", head_dim)))
            present.append(Port(f"present.{layer.index}.{name}", ("batch", groups, "past + sequence", head_dim)))
    embeds = Port("inputs_embeds", ("batch", "sequence", hidden))
    mask = Port("attention_mask", ("batch", "past + sequence"), torch.int64)
    positions = Port("position_ids", ("batch", "sequence"), torch.int64)
    logits = Port("logits", ("batch", 1, anatomy.vocab_size))
    return {
        VISION: Ports([Port("pixel_values", pixels)], [Port("image_features", ("images", geometry.image_tokens, hidden))]),
        EMBED: Ports([Port("input_ids", ("batch", "sequence"), torch.int64)], [embeds]),
        DECODER: Ports([embeds, mask, positions, *past], [logits, *present]),
    }


@contextlib.contextmanager
def _pretending(module: nn.Module) -> Iterator[None]:
    """Gives a module parameters on the CPU that have shapes and no memory, for as long as it is traced."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for owner in module.modules():
            for name, p in list(owner.named_parameters(recurse=False)):
                setattr(owner, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=False))
        yield


def _weight(model: PreTrainedModel, name: str) -> torch.Tensor:
    """A weight of a model, from its shelf where it has one."""
    shelf = getattr(model, "infoprune_shelf", {})
    return shelf[name] if name in shelf else model.get_parameter(name)


def _name_weights(graph: ir.Model, module: Component, weight: Callable[[str], torch.Tensor]) -> None:
    """Gives the initialisers the names that the parameters have in the Hugging Face model, and their contents once asked for."""
    for own, (name, transposed) in module.weights().items():
        if own not in graph.graph.initializers:
            continue
        value = graph.graph.initializers.pop(own)
        dtype = value.dtype

        def read(name: str = name, transposed: bool = transposed, dtype: ir.DataType = dtype) -> ir.TensorProtocol:
            found = weight(name).detach()
            return TorchTensor((found.T if transposed else found).to("cpu", to_torch_dtype(dtype)).contiguous(), name=name)

        value.name = name
        value.const_value = ir.LazyTensor(read, dtype, value.shape, name=name)
        graph.graph.initializers[name] = value


def _simplify(model: ir.Model) -> None:
    """Folds, fuses and cleans; weights keep their names and stay apart even where they are equal."""
    onnxscript.optimizer.fold_constants(model)
    onnxscript.rewriter.rewrite(model)
    fuse_rotary(model)
    onnx_fusions.fuse(model)
    passes.RemoveUnusedNodesPass()(model)
    _free_heads(model.graph)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _merge_constants(model.graph)
    for clean in (
        passes.CommonSubexpressionEliminationPass(),
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.OutputFixPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.TopologicalSortPass(),
    ):
        clean(model)


def _free_heads(graph: ir.Graph) -> None:
    """Lets the reshapes that split and join heads count them, so that they hold for any number of heads.

    [a, b, c] -> [a, b, heads, head_dim] becomes Reshape(x, [0, 0, -1, head_dim]); joining becomes Reshape(x, [0, 0, -1]).
    """
    for node in list(graph):
        if node.op_type != "Reshape" or None in (node.inputs[0].shape, node.outputs[0].shape):
            continue
        before, after = list(node.inputs[0].shape), list(node.outputs[0].shape)
        if sorted((len(before), len(after))) != [3, 4] or before[:2] != after[:2]:
            continue
        sizes = [0, 0, -1, after[3]] if len(after) == 4 else [0, 0, -1]
        name = "split_heads_" + str(after[3]) if len(after) == 4 else "join_heads"
        shape = ir.Value(name=f"{name}.{node.outputs[0].name}", const_value=ir.tensor(sizes, dtype=ir.DataType.INT64))
        graph.register_initializer(shape)
        node.replace_input_with(1, shape)
        node.attributes.pop("allowzero", None)


def _merge_constants(graph: ir.Graph) -> None:
    """Makes one initialiser of equal shapes and scalars, without which equal expressions are not recognised as such."""
    first: dict[tuple, ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if not tensor.dtype.is_integer() and tensor.size > 1:
            continue
        kept = first.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del graph.initializers[name]


def _name_ports(model: ir.Model, ports: Ports, dtype: Dtype) -> None:
    """Names inputs, outputs and their dynamic axes; drops what the tracer noted on its way (files, lines, shapes)."""
    graph = model.graph
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for node in graph:
        for value in node.outputs:
            value.shape = value.type = None
            value.metadata_props.clear()
    for values, described in ((graph.inputs, ports.inputs), (graph.outputs, ports.outputs)):
        for value, port in zip(values, described, strict=True):
            value.name = port.name
            value.shape = ir.Shape(port.shape)
            value.type = ir.TensorType(ONNX_TYPES[dtype] if port.dtype == STAND_IN else ir.DataType.INT64)
    passes.ClearMetadataAndDocStringPass()(model)
    for i, node in enumerate(graph):
        node.name = f"{node.op_type}_{i}"
    model.metadata_props.clear()
    graph.name = "infoprune_export"


def _describe_sites(model: ir.Model, anatomy: Anatomy) -> None:
    """Notes in the metadata which initialisers make up each site's map and the projector, for readers without PyTorch."""
    names = model.graph.initializers
    sites = {}
    for layer in anatomy.layers():
        for role in (*ATTENTION_ROLES, *layer.ffn.matrices):
            path = layer.linear(role).path
            weights = [n for n in (f"{path}.weight", f"{path}.first.weight", f"{path}.second.weight") if n in names]
            bias = next((n for n in (f"{path}.bias", f"{path}.second.bias") if n in names), None)
            if weights:
                sites[site(layer.tower, layer.index, role)] = {"weight": weights, "bias": bias, "transposed": True}
    if sites:
        model.metadata_props[SITES_KEY] = json.dumps(sites)
    projector = [n for n in (f"{linear.path}.weight" for linear in anatomy.projector) if n in names]
    if projector:
        model.metadata_props[PROJECTOR_KEY] = json.dumps(projector)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's chatter off the terminal, unless the package's logger is set to debug."""
    if logging.getLogger("infoprune_export").isEnabledFor(logging.DEBUG):
        yield
        return
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [x.level for x in loggers]
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        for x in loggers:
            x.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for x, level in zip(loggers, levels, strict=True):
                x.setLevel(level)
