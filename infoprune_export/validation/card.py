"""The model card of a bundle: its README.md.

The card is hashed with the bundle, so it holds what the same inputs and seed give again: FLOPs, sizes and
accuracies, and no times.
"""

from __future__ import annotations

import json
from pathlib import PurePath

from infoprune_export.bundle import Manifest
from infoprune_export.models.anatomy import Layer
from infoprune_export.plans import LayerPlan, Plan
from infoprune_export.recipe import DataSource
from infoprune_export.validation import figures
from infoprune_export.validation.report import Report


def model_card(manifest: Manifest, plan: Plan, report: Report, licence: str | None = None) -> str:
    """The card as Markdown with the hub's YAML header.

    Args:
        manifest: Source, workload, targets.
        plan: What was removed.
        report: Accuracies and sizes; its times are not used.
        licence: Of the source model, as its own card names it; None where it is not known.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("infoprune_export.validation", "templates"),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "quoted": json.dumps,
        "code": code_span,
        "plain": plain,
        "si": figures.si,
        "fraction": figures.fraction,
        "drop": figures.drop,
        "interval": figures.interval,
    }
    towers = [_removed(name, list(plan.anatomy.tower(name).layers), plan) for name in ("vision", "language")]
    hub_id = manifest.source.id if _is_hub_id(manifest.source.id) else None
    return environment.get_template("README.md.j2").render(
        manifest=manifest,
        latency_budget=figures.latency_budget(report) if report.latency_budget else None,
        whose=figures.WHOSE[manifest.flops.scope],
        plan=plan,
        report=report,
        licence=licence,
        towers=towers,
        hub_id=hub_id,
        removed=" and ".join(_changes(plan)),
        calibration=[code_span(_name(source)) for source in manifest.recipe.calibration],
    )


def code_span(text: object) -> str:
    """Any text as an inline code span that it cannot leave, in a table or out of one."""
    return "`" + " ".join(str(text).split()).replace("`", "'").replace("|", "/") + "`"


def plain(text: object) -> str:
    """Any text as one line of Markdown with nothing in it that Markdown or HTML would act on."""
    return "".join("\\" + c if c in "\\`*_{}[]<>#|!&~" else c for c in " ".join(str(text).split()))


def _is_hub_id(source: str) -> bool:
    owner, _, name = source.partition("/")
    return bool(owner and name) and not any(c in source for c in ":\\ ") and name.count("/") == 0 and owner not in (".", "..")


def _changes(plan: Plan) -> list[str]:
    """What was done to the network, in words."""
    heads = any(len(plan.decision(x.tower, x.index).heads) < x.attention.heads for x in plan.anatomy.layers())
    done = ["attention heads were removed"] if heads else []
    return done + (["feed-forward matrices were replaced by low-rank pairs"] if plan.low_rank_sites() else [])


def _name(source: DataSource) -> str:
    """What a set of questions is called; never where it lay on somebody's disk."""
    name = source.path if source.path.startswith("tiny:") else PurePath(source.path).name
    return f"{name} ({source.split})" if source.split else name


def _removed(name: str, layers: list[Layer], plan: Plan) -> dict[str, object]:
    decisions = [(layer, plan.decision(layer.tower, layer.index)) for layer in layers]
    return {
        "name": {"vision": "vision tower", "language": "language model"}[name],
        "layers": len(layers),
        "heads": sum(x.attention.heads for x in layers),
        "heads_kept": sum(len(d.heads) for _, d in decisions),
        "groups": sum(x.attention.kv_groups for x in layers),
        "groups_kept": sum(len(d.kv_groups) for _, d in decisions),
        "matrices": sum(len(x.ffn.matrices) for x in layers),
        "low_rank": sum(rank is not None for _, d in decisions for rank in d.ranks.values()),
        "mean_rank": _mean_rank(decisions),
    }


def _mean_rank(decisions: list[tuple[Layer, LayerPlan]]) -> float | None:
    """Mean of rank over full rank, of the low-rank pairs."""
    shares = [
        rank / min(layer.ffn.matrices[role].d_in, layer.ffn.matrices[role].d_out)
        for layer, decision in decisions
        for role, rank in decision.ranks.items()
        if rank is not None
    ]
    return sum(shares) / len(shares) if shares else None
