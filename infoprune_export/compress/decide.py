"""From statistics to a plan: score every unit and every spectrum, then spend the budget."""

from __future__ import annotations

from torch import nn

from infoprune_export.compress.allocate import RankChoice, UnitChoice, allocate
from infoprune_export.compress.heads import score_layer
from infoprune_export.compress.lowrank import spectrum, weighting
from infoprune_export.compress.statistics import Statistics
from infoprune_export.models.anatomy import Anatomy, Layer, site
from infoprune_export.models.flops import attention_flops, count, linear_macs, tower_passes
from infoprune_export.plans import Budget, LayerPlan, Plan, Source
from infoprune_export.recipe import Criterion, Scope, Workload


def decide(
    model: nn.Module,
    anatomy: Anatomy,
    stats: Statistics,
    *,
    source: Source,
    criterion: Criterion,
    workload: Workload,
    flops: float,
    scope: Scope,
    seed: int = 0,
) -> Plan:
    """Decides what is kept of every layer.

    Args:
        model: The original.
        anatomy: Of that model.
        stats: Pass 1 on it.
        source: Recorded in the plan.
        criterion: How to score.
        workload: What the FLOPs are counted for.
        flops: Fraction kept of the original's FLOPs over the scope, 0 < flops < 1.
        scope: What the fraction is of, and what may be cut.
        seed: Recorded in the plan.

    Raises:
        InputError: the budget is below what can be reached.
    """
    towers = tower_passes(anatomy, workload)
    cut = [x for x in anatomy.layers() if scope in ("all", x.tower)]
    units, ranks = [], []
    for layer in cut:
        units += _units(model, layer, stats, criterion, workload, anatomy)
        for role, linear in layer.ffn.matrices.items():
            key = site(layer.tower, layer.index, role)
            moments = stats.ffn[key]
            weight = model.get_submodule(linear.path).weight.double()
            per_mac = 2 * towers[layer.tower].tokens
            ranks.append(
                RankChoice(
                    (layer.tower, layer.index, role),
                    spectrum(linear, weighting(key, linear, weight, moments, stats)).numpy(),
                    per_mac * linear_macs(linear, 1),
                    per_mac * linear_macs(linear),
                    criterion.rank_multiple,
                )
            )
    original = count(anatomy, workload).over(scope)
    fixed = original - sum(u.cost for u in units) - sum(r.dense_cost for r in ranks)
    found = allocate(units, ranks, int(flops * original), fixed)
    layers = [_layer_plan(x, found.units.get((x.tower, x.index)), found.ranks) for x in anatomy.layers()]
    return _with_budget(layers, anatomy, source, criterion, workload, flops, scope, seed)


def keep_everything(anatomy: Anatomy, *, source: Source, criterion: Criterion, workload: Workload, scope: Scope, seed: int = 0) -> Plan:
    """The plan that removes nothing."""
    return _with_budget([_layer_plan(x, None, {}) for x in anatomy.layers()], anatomy, source, criterion, workload, 1.0, scope, seed)


def _units(
    model: nn.Module, layer: Layer, stats: Statistics, criterion: Criterion, workload: Workload, anatomy: Anatomy
) -> list[UnitChoice]:
    passes, attention = tower_passes(anatomy, workload)[layer.tower], layer.attention
    scores = score_layer(layer, model.get_submodule(attention.o.path).weight, stats, criterion.erank_weight)
    cost = attention_flops(layer, attention.heads_per_group, 1, passes)
    return [UnitChoice((layer.tower, layer.index), s.group, criterion.head_weight * s.score, cost) for s in scores]


def _layer_plan(layer: Layer, kept: list[int] | None, ranks: dict[tuple[str, int, str], int | None]) -> LayerPlan:
    groups = list(range(layer.attention.kv_groups)) if kept is None else kept
    per_group = layer.attention.heads_per_group
    return LayerPlan(
        tower=layer.tower,
        layer=layer.index,
        kv_groups=groups,
        heads=[g * per_group + i for g in groups for i in range(per_group)],
        ranks={role: ranks.get((layer.tower, layer.index, role)) for role in layer.ffn.matrices},
    )


def _with_budget(
    layers: list[LayerPlan],
    anatomy: Anatomy,
    source: Source,
    criterion: Criterion,
    workload: Workload,
    flops: float,
    scope: Scope,
    seed: int,
) -> Plan:
    original = count(anatomy, workload).over(scope)
    empty = Budget(scope=scope, requested=flops, predicted=1.0, original_flops=original, compressed_flops=original)
    plan = Plan(source=source, seed=seed, criterion=criterion, workload=workload, budget=empty, layers=layers, anatomy=anatomy)
    compressed = count(anatomy, workload, plan).over(scope)
    plan.budget = empty.model_copy(update={"predicted": compressed / original, "compressed_flops": compressed})
    return plan
