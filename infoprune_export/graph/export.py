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
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript.rewriter import onnx_fusions
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from transformers import PreTrainedModel

from infoprune_export.bundle import COMPONENTS, DECODER, EMBED, VISION, graph_file
from infoprune_export.errors import InputError
from infoprune_export.graph.components import OPSET, Component, split
from infoprune_export.graph.fusions import fuse_rotary
from infoprune_export.graph.storage import PROJECTOR_KEY, SITES_KEY, save_graph
from infoprune_export.models.anatomy import ATTENTION_ROLES, Anatomy, site
from infoprune_export.recipe import Dtype

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ONNX_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
}
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Port:
    """Name, shape and type of a graph's input or output; a dynamic axis has a name."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype

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


def export_graphs(
    model: PreTrainedModel, anatomy: Anatomy, out_dir: Path, dtype: Dtype = "fp32", progress: Progress | None = None
) -> dict[str, Path]:
    """Writes the three graphs of a model, original or compressed.

    Args:
        model: The PyTorch model, laid out or on the CPU; it is not changed. Weights are read one by one, when they are written.
        anatomy: Of the original.
        out_dir: Directory for the graphs, made if needed.
        dtype: Type of weights, activations, cache and logits. Softmax, norms and positions compute in fp32 inside.
        progress: Told each component's name before it is traced.

    Returns:
        Component name to path of its graph.

    Raises:
        InputError: the model has something that no graph can express, or that the exporter cannot trace.
    """
    modules = split(model, anatomy, TORCH_DTYPES[dtype])
    ports = _ports(model, anatomy, TORCH_DTYPES[dtype])
    out_dir.mkdir(parents=True, exist_ok=True)
    paths, shared = {}, {}
    for component in COMPONENTS:
        if progress:
            progress(component)
        graph = trace(modules.pop(component), ports[component], partial(_weight, model))
        _describe_sites(graph, anatomy)
        paths[component] = out_dir / graph_file(component, dtype)
        written = save_graph(graph, paths[component], shared)
        if component == EMBED:  # a tied output head refers to the embedding's file
            shared = written
    return paths


def trace(module: Component, ports: Ports, weight: Callable[[str], torch.Tensor]) -> ir.Model:
    """One component as an ONNX graph with the given inputs and outputs.

    Args:
        module: From `split`, without weights.
        ports: Its inputs and outputs.
        weight: Gives a weight by its name in the Hugging Face model, when the graph is written.
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
    _name_weights(graph, module, weight)
    _simplify(graph)
    _name_ports(graph, ports)
    return graph


def _nested(flat: list) -> tuple:
    """The decoder's arguments: three tensors and a list of key-value pairs."""
    return (*flat[:3], list(zip(flat[3::2], flat[4::2], strict=True)))


def _ports(model: PreTrainedModel, anatomy: Anatomy, dtype: torch.dtype) -> dict[str, Ports]:
    geometry, hidden = anatomy.geometry, anatomy.language.hidden
    pixels = ("images", geometry.channels, geometry.image_size, geometry.image_size)
    past, present = [], []
    for layer in anatomy.language.layers:
        head_dim = layer.attention.head_dim
        groups = model.get_submodule(layer.attention.k.path).out_features // head_dim
        for name in ("key", "value"):
            past.append(Port(f"past_key_values.{layer.index}.{name}", ("batch", groups, "past", head_dim), dtype))
            present.append(Port(f"present.{layer.index}.{name}", ("batch", groups, "past + sequence", head_dim), dtype))
    embeds = Port("inputs_embeds", ("batch", "sequence", hidden), dtype)
    mask = Port("attention_mask", ("batch", "past + sequence"), torch.int64)
    positions = Port("position_ids", ("batch", "sequence"), torch.int64)
    logits = Port("logits", ("batch", 1, anatomy.vocab_size), dtype)
    return {
        VISION: Ports([Port("pixel_values", pixels, dtype)], [Port("image_features", ("images", geometry.image_tokens, hidden), dtype)]),
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
    parameters = dict(module.named_parameters())
    for own, (name, transposed) in module.weights().items():
        if own not in graph.graph.initializers:
            continue
        value, dtype = graph.graph.initializers.pop(own), parameters[own].dtype

        def read(name: str = name, transposed: bool = transposed, dtype: torch.dtype = dtype) -> ir.TensorProtocol:
            found = weight(name).detach()
            return TorchTensor((found.T if transposed else found).to("cpu", dtype).contiguous(), name=name)

        value.name = name
        value.const_value = ir.LazyTensor(read, ONNX_DTYPES[dtype], ir.Shape(parameters[own].shape), name=name)
        graph.graph.initializers[name] = value


def _simplify(model: ir.Model) -> None:
    """Folds, fuses and cleans; weights keep their names and stay apart even where they are equal."""
    passes.InlinePass()(model)
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


def _name_ports(model: ir.Model, ports: Ports) -> None:
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
            value.type = ir.TensorType(ONNX_DTYPES[port.dtype])
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
