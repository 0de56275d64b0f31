"""What a plan keeps, what a bundle holds, what a graph consists of: as facts and as tables."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoprune_export.bundle import MANIFEST, Bundle, Manifest
from infoprune_export.errors import InputError
from infoprune_export.models.anatomy import Layer, Linear
from infoprune_export.models.flops import DENOMINATORS, layer_flops, tower_passes
from infoprune_export.plans import LayerPlan, Plan

if TYPE_CHECKING:
    from rich.table import Table


def describe(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """Looks at a plan, a bundle or an ONNX graph.

    Returns:
        The facts, ready for JSON, and the same as renderables for a terminal.

    Raises:
        InputError: none of the three.
    """
    if path.is_dir() and (path / MANIFEST).is_file():
        return _bundle(Bundle.open(path))
    if path.is_dir() and (path / "plan.json").is_file():
        path = path / "plan.json"
    if path.suffix == ".json" and path.is_file():
        plan = Plan.read(path)
        return plan_facts(plan), list(plan_tables(plan))
    if path.suffix == ".onnx" and path.is_file():
        return _graph(path)
    raise InputError("is no plan, bundle or ONNX graph", where=path)


def plan_facts(plan: Plan) -> dict[str, Any]:
    """One record per layer: what is kept of heads, groups, ranks, FLOPs and parameters."""
    passes = tower_passes(plan.anatomy, plan.workload)
    layers = []
    for layer in plan.anatomy.layers():
        d, p = plan.decision(layer.tower, layer.index), passes[layer.tower]
        layers.append(
            {
                "tower": layer.tower,
                "layer": layer.index,
                "heads": [len(d.heads), layer.attention.heads],
                "kv_groups": [len(d.kv_groups), layer.attention.kv_groups],
                "ranks": {role: [d.ranks[role], min(m.d_in, m.d_out)] for role, m in layer.ffn.matrices.items()},
                "flops": [layer_flops(layer, d, p), layer_flops(layer, None, p)],
                "parameters": [parameters(layer, d), parameters(layer, None)],
            }
        )
    return {
        "source": plan.source.model_dump(),
        "budget": plan.budget.model_dump(),
        "workload": plan.workload.model_dump(),
        "layers": layers,
    }


def parameters(layer: Layer, decision: LayerPlan | None) -> int:
    """Parameters of a layer's linear maps, whole (None) or as planned; norms are left out."""

    def size(m: Linear, d_in: int, d_out: int, rank: int | None = None) -> int:
        return (d_in * d_out if rank is None else rank * (d_in + d_out)) + (d_out if m.bias else 0)

    a = layer.attention
    heads, groups = (a.heads, a.kv_groups) if decision is None else (len(decision.heads), len(decision.kv_groups))
    ranks: dict[str, int | None] = {} if decision is None else dict(decision.ranks)
    total = size(a.q, a.q.d_in, heads * a.head_dim) + size(a.o, heads * a.head_dim, a.o.d_out)
    total += size(a.k, a.k.d_in, groups * a.head_dim) + size(a.v, a.v.d_in, groups * a.head_dim)
    return total + sum(size(m, m.d_in, m.d_out, ranks.get(role)) for role, m in layer.ffn.matrices.items())


def plan_tables(plan: Plan) -> list[Table | str]:
    """A heading and a table per tower."""
    from rich.table import Table

    facts, b = plan_facts(plan), plan.budget
    out: list[Table | str] = [
        f"{plan.source.id}: {b.predicted:.4f} of {b.original_flops / 1e9:.3g} GFLOP kept, {b.asked} asked "
        f"({DENOMINATORS[b.scope]}; {plan.workload})"
    ]
    if b.latency:
        x = b.latency
        out.append(f"time of a request here: {x.predicted:.4f} of {x.original_ms:.3g} ms predicted, {x.requested:g} asked")
    if b.eps:
        out.append("feed-forward spectral mass cut off (KS distance): " + ", ".join(f"{tower} {eps:.4f}" for tower, eps in b.eps.items()))
    if plan.training:
        out.append(f"trained: {plan.training}")
    for tower in ("vision", "language"):
        rows = [r for r in facts["layers"] if r["tower"] == tower]
        grouped = any(r["kv_groups"] != r["heads"] for r in rows)
        roles = list(rows[0]["ranks"])
        table = Table(title=tower, title_justify="left", box=None, header_style="dim", padding=(0, 2, 0, 0))
        for name in ("layer", "heads", *(["kv groups"] if grouped else []), *(f"rank {r}" for r in roles), "FLOPs kept", "parameters"):
            table.add_column(name, justify="right", no_wrap=True)
        for r in rows:
            cells = [str(r["layer"]), _of(*r["heads"]), *([_of(*r["kv_groups"])] if grouped else [])]
            cells += [_of(*r["ranks"][role]) if r["ranks"][role][0] else "dense" for role in roles]
            table.add_row(*cells, f"{r['flops'][0] / r['flops'][1]:.2f}", f"{r['parameters'][0] / r['parameters'][1]:.2f}")
        out.append(table)
    return out


def _of(kept: int, whole: int) -> str:
    return f"{kept}/{whole}"


def _bundle(bundle: Bundle) -> tuple[dict[str, Any], list[Any]]:
    from rich.table import Table

    m, plan = bundle.manifest, bundle.plan()
    facts = {
        "source": m.source.model_dump(),
        "flops": m.flops.model_dump(),
        "workload": m.workload.model_dump(),
        "targets": m.targets,
        "dtypes": m.dtypes,
        "weights": m.weights.model_dump() if m.weights else None,
        "files": {k: r.bytes for k, r in m.files.items()},
    }
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("file")
    table.add_column("MB", justify="right")
    for name, record in m.files.items():
        table.add_row(name, f"{record.bytes / 1e6:.2f}")
    return facts, [
        f"{m.source.id}: {m.flops.achieved:.4f} of the FLOPs kept, {plan.budget.asked} asked ({m.flops.denominator}; {m.workload})",
        *([_quantised(m)] if m.weights else []),
        table,
        *plan_tables(plan)[1:],
    ]


def _quantised(m: Manifest) -> str:
    counts = ", ".join(f"{c.matrices} matrices of {name} in {c.type}" for name, c in m.weights.components.items())
    return f"also with {m.weights.type} weights in blocks of {m.weights.block_size} ({', '.join(m.quantised)}): {counts}"


def _graph(path: Path) -> tuple[dict[str, Any], list[Any]]:
    import onnx
    from google.protobuf.message import DecodeError
    from rich.table import Table

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as e:
        raise InputError(f"is not an ONNX graph ({e})", where=path) from None

    def shape(value: onnx.ValueInfoProto) -> str:
        t = value.type.tensor_type
        kind = onnx.TensorProto.DataType.Name(t.elem_type).lower()
        return f"{kind}[{', '.join(d.dim_param or str(d.dim_value) for d in t.shape.dim)}]"

    nodes = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph.node)
    facts = {
        "opset": {o.domain or "ai.onnx": o.version for o in model.opset_import},
        "inputs": {v.name: shape(v) for v in model.graph.input},
        "outputs": {v.name: shape(v) for v in model.graph.output},
        "nodes": dict(nodes.most_common()),
    }
    tables = []
    for title in ("inputs", "outputs", "nodes"):
        table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
        for k, v in facts[title].items():
            table.add_row(k, str(v))
        tables.append(table)
    return facts, tables
