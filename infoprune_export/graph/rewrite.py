"""A plan and its factors applied to the original's ONNX graphs, without PyTorch.

The result is the network that comes out of changing the PyTorch model and exporting it: the same nodes, the same
names, the same weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir

from infoprune_export.bundle import COMPONENTS, DECODER, EMBED, VISION, graph_file
from infoprune_export.errors import InputError
from infoprune_export.graph.storage import SITES_KEY, data_file, load_graph, metadata, save_graph, set_metadata, weight_files
from infoprune_export.models.anatomy import ATTENTION_ROLES, Attention, Layer, site
from infoprune_export.plans import Factors, LayerPlan, Plan, projector_key
from infoprune_export.recipe import Dtype


def rewrite_graphs(original_onnx_dir: Path, plan: Plan, factors: Factors, out_dir: Path, dtype: Dtype = "fp32") -> dict[str, Path]:
    """Writes the compressed network's graphs from the original's.

    Args:
        original_onnx_dir: Graphs of the original, as `export_graphs` wrote them.
        plan: What to keep.
        factors: Contents of factors.safetensors. A dense map that is absent is taken, or sliced, from the original;
            a missing low-rank pair is an error.
        out_dir: Directory for the new graphs, made if needed; not the original's.
        dtype: Which of the original's graphs to take; factors are converted to it.

    Returns:
        Component name to path of its graph.

    Raises:
        InputError: naming the site, where the plan does not fit the graphs or a factor is missing or misshapen.
    """
    sources = {component: original_onnx_dir / graph_file(component, dtype) for component in COMPONENTS}
    surgeons = {component: _Surgeon(sources[component], plan, factors) for component in (VISION, DECODER)}
    found = set().union(*(surgeon.apply() for surgeon in surgeons.values()))
    if missing := {site(x.tower, x.index, "q") for x in plan.anatomy.layers()} - found:
        raise _unfit(min(missing), "the graphs have no such site")
    out_dir.mkdir(parents=True, exist_ok=True)
    for file in (sources[EMBED], data_file(sources[EMBED])):
        shutil.copyfile(file, out_dir / file.name)
    for component, surgeon in surgeons.items():
        surgeon.save(out_dir / sources[component].name)
    return {component: out_dir / source.name for component, source in sources.items()}


class _Surgeon:
    """One graph being rewritten; weights that stay as they are are never read."""

    def __init__(self, path: Path, plan: Plan, factors: Factors):
        self.path, self.plan, self.factors = path, plan, factors
        self.proto = load_graph(path)
        self.weights = {t.name: t for t in self.proto.graph.initializer}
        self.sites = metadata(self.proto, SITES_KEY, None)
        if self.sites is None:
            raise InputError("does not say where its sites are", where=path, mend="export the original again with this version")
        self.graph = gs.import_onnx(self.proto)
        self.tensors = self.graph.tensors()

    def apply(self) -> set[str]:
        """Applies the plan to the layers that this graph holds; returns their sites."""
        layers = {site(x.tower, x.index, role): x for x in self.plan.anatomy.layers() for role in (*ATTENTION_ROLES, *x.ffn.matrices)}
        if unknown := set(self.sites) - set(layers):
            raise _unfit(min(unknown), "the plan's model has no such site")
        here = {id(layers[key]): layers[key] for key in self.sites}
        for layer in here.values():
            decision = self.plan.decision(layer.tower, layer.index)
            for role in (*ATTENTION_ROLES, *layer.ffn.matrices):
                self._check(layer, role)
            self._prune(layer, decision)
            for role, rank in decision.ranks.items():
                if rank is not None:
                    self._split(layer, role, rank)
            for role in (*ATTENTION_ROLES, *layer.ffn.matrices):
                key = site(layer.tower, layer.index, role)
                self._replace(key, self.sites[key]["weight"][0], self.sites[key]["bias"])
        for i, linear in enumerate(self.plan.anatomy.projector):
            if (weight := f"{linear.path}.weight") in self.weights:
                self._replace(projector_key(i), weight, f"{linear.path}.bias" if linear.bias else None)
        return set(self.sites)

    def save(self, path: Path) -> None:
        self.graph.cleanup(remove_unused_graph_inputs=False)
        proto = gs.export_onnx(self.graph, do_type_check=False)
        proto.ir_version = self.proto.ir_version
        set_metadata(proto, {p.key: p.value for p in self.proto.metadata_props}, {SITES_KEY: self.sites})
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, self.path.parent)
        kept = {name for name, file in weight_files(self.proto).items() if file != data_file(self.path).name}
        shared = {name: v.const_value for name, v in model.graph.initializers.items() if name in kept}
        save_graph(model, path, shared)

    def _prune(self, layer: Layer, decision: LayerPlan) -> None:
        attention = layer.attention
        if len(decision.heads) == attention.heads:
            return
        heads, groups = _rows(attention, decision.heads), _rows(attention, decision.kv_groups)
        for role, rows in (("q", heads), ("k", groups), ("v", groups)):
            self._change(layer, role, lambda w, rows=rows: w[:, rows], lambda b, rows=rows: b[rows])
        key = site(layer.tower, layer.index, "o")
        self._change(layer, "o", lambda w: w[heads], lambda b: b)
        if self.plan.gains_bias(layer):
            self._add_bias(layer, key)
        for port in (*self.graph.inputs, *self.graph.outputs):
            if layer.tower == "language" and port.name.rpartition(".")[0] in _ports(layer.index):
                port.shape = [port.shape[0], len(decision.kv_groups), *port.shape[2:]]

    def _change(
        self, layer: Layer, role: str, weight: Callable[[np.ndarray], np.ndarray], bias: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        """Replaces a map's weight [d_in, d_out] and bias."""
        entry = self.sites[site(layer.tower, layer.index, role)]
        self._put(entry["weight"][0], weight)
        if entry["bias"]:
            self._put(entry["bias"], bias)

    def _replace(self, key: str, weight: str, bias: str | None) -> None:
        """Gives a dense map the weights that the factors have for it, if any; `bias` may be one that was added."""
        if f"{key}.weight" not in self.factors:
            return
        d_in, d_out = self.tensors[weight].shape
        self._put(weight, lambda _: self._factor(f"{key}.weight", (d_out, d_in)).T)
        if bias in self.weights:
            self._put(bias, lambda _: self._factor(f"{key}.bias", (d_out,)))

    def _add_bias(self, layer: Layer, key: str) -> None:
        """Turns MatMul(x, W) into MatMul(x, W) + bias."""
        entry, path = self.sites[key], layer.attention.o.path
        weight = self.tensors[entry["weight"][0]]
        (node,) = weight.outputs
        values = self._factor(f"{key}.bias", (layer.attention.o.d_out,)).astype(weight.values.dtype)
        bias, product = gs.Constant(f"{path}.bias", np.ascontiguousarray(values)), gs.Variable(f"{path}.product")
        after = gs.Node("Add", f"{node.name}_bias", inputs=[product, bias], outputs=list(node.outputs))
        node.outputs = [product]
        self.graph.nodes.insert(self.graph.nodes.index(node) + 1, after)
        self.sites[key] = {**entry, "bias": f"{path}.bias"}

    def _put(self, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
        old = self._read(name)
        constant = self.tensors[name]
        constant.values = np.ascontiguousarray(change(old).astype(old.dtype))
        constant.data_location = None  # no longer in the original's weight file

    def _split(self, layer: Layer, role: str, rank: int) -> None:
        """Turns MatMul(x, W) into MatMul(MatMul(x, first), second); a bias is added after it as before."""
        key, linear = site(layer.tower, layer.index, role), layer.linear(role)
        entry = self.sites[key]
        name = entry["weight"][0]
        stem = name.removesuffix(".weight")
        weight = self.tensors[name]
        (node,) = weight.outputs
        dtype = self._read(name).dtype
        names = [f"{stem}.first.weight", f"{stem}.second.weight"]
        shapes = {"first": (rank, linear.d_in), "second": (linear.d_out, rank)}
        first, second = (
            gs.Constant(n, np.ascontiguousarray(self._factor(f"{key}.{part}", shape).T.astype(dtype)))
            for n, (part, shape) in zip(names, shapes.items(), strict=True)
        )
        narrow = gs.Variable(f"{stem}.first")
        before = gs.Node("MatMul", f"{node.name}_first", inputs=[node.inputs[0], first], outputs=[narrow])
        self.graph.nodes.insert(self.graph.nodes.index(node), before)
        node.inputs = [narrow, second]
        if entry["bias"]:
            bias = self.tensors[entry["bias"]]
            self._put(bias.name, lambda b: self._factor(f"{key}.bias", b.shape))
            bias.name = f"{stem}.second.bias"
        self.sites[key] = {"weight": names, "bias": entry["bias"] and f"{stem}.second.bias", "transposed": True}

    def _check(self, layer: Layer, role: str) -> None:
        key, linear = site(layer.tower, layer.index, role), layer.linear(role)
        entry = self.sites.get(key)
        if entry is None:
            raise _unfit(key, "the graphs have no such site")
        if len(entry["weight"]) != 1:
            raise _unfit(key, "is low-rank already", "apply plans to the original's graphs")
        found = list(self.weights[entry["weight"][0]].dims)
        if found != [linear.d_in, linear.d_out] or bool(entry["bias"]) != linear.bias:
            raise _unfit(key, f"is a {found[1]} x {found[0]} map here, the plan's is {linear.d_out} x {linear.d_in}")

    def _read(self, name: str) -> np.ndarray:
        return ir.serde.deserialize_tensor(self.weights[name], base_path=self.path.parent).numpy()

    def _factor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        where, mend = "factors.safetensors", "use the factors that were made with this plan"
        if name not in self.factors:
            raise InputError(f"{name} is missing", where=where, mend=mend)
        array = self.factors[name]
        if array.shape != tuple(shape):
            raise InputError(f"{name} has shape {list(array.shape)}, the plan asks for {list(shape)}", where=where, mend=mend)
        return array


def _rows(attention: Attention, kept: list[int]) -> list[int]:
    return [h * attention.head_dim + i for h in kept for i in range(attention.head_dim)]


def _ports(layer: int) -> tuple[str, str]:
    return f"past_key_values.{layer}", f"present.{layer}"


def _unfit(key: str, what: str, mend: str = "use the plan with the model it was made for") -> InputError:
    return InputError(what, where=f"plan, {key}", mend=mend)
