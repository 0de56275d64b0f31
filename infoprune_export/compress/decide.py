"""From what pass 1 found to a plan: every unit and every singular value competes for the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping

from infoprune_export.compress.allocate import (
    LayerKey,
    RankChoice,
    UnitChoice,
    allocate,
    allocate_with_floors,
    best_units,
    by_layer,
    check_reachable,
)
from infoprune_export.compress.evidence import needs_gradients
from infoprune_export.compress.findings import Findings
from infoprune_export.compress.prices import Flops, Nanoseconds, Prices
from infoprune_export.compress.scores import HEAD_RULES
from infoprune_export.compress.shares import d_rank, keep_share, proportional, rank_within_layers, uniform
from infoprune_export.errors import InputError
from infoprune_export.models.anatomy import TOWERS, Anatomy, Layer
from infoprune_export.models.flops import count, linear_macs, tower_passes
from infoprune_export.plans import Budget, LatencyBudget, LayerPlan, Plan, Source
from infoprune_export.recipe import Criterion, Floor, Scope, Workload
from infoprune_export.timetable import TimeTable

RankKey = tuple[str, int, str]


def decide(
    findings: Findings,
    anatomy: Anatomy,
    *,
    source: Source,
    criterion: Criterion,
    workload: Workload,
    flops: float = 1.0,
    latency: float | None = None,
    table: TimeTable | None = None,
    scope: Scope,
    seed: int = 0,
    heads: Mapping[LayerKey, list[int]] | None = None,
) -> Plan:
    """Decides what is kept of every layer.

    Args:
        findings: Of pass 1, by the same criterion.
        anatomy: Of the original.
        source: Recorded in the plan.
        criterion: How to score and to allocate.
        workload: What the FLOPs are counted for.
        flops: Fraction kept of the original's FLOPs over the scope, 0 < flops < 1.
        latency: Instead of FLOPs, fraction kept of the time of the original's whole request, 0 < latency < 1, by `table`.
        table: Measured times.
        scope: What the fraction of FLOPs is of, and what may be cut.
        seed: Recorded in the plan.
        heads: (tower, layer) to the KV groups that stay, where they were chosen already; only ranks are decided then,
            and layers that are not named keep all.

    Raises:
        InputError: the budget is below what can be reached, or the calibration data say nothing about a tower.
    """
    cut = layers_to_cut(anatomy, workload, scope)
    _check_seen(cut, findings, criterion)
    prices = Flops(anatomy, workload) if table is None else Nanoseconds(table)
    units = units_of(findings, cut, criterion, prices)
    ranks = _ranks(findings, cut, anatomy, criterion, workload, prices)
    original = prices.whole(scope)
    fixed = original - sum(u.cost for u in units) - sum(r.cost(None) for r in ranks)
    budget = int((latency or flops) * original)
    if heads is None and criterion.head_share is None and criterion.one_currency:
        found = allocate_with_floors(
            units, ranks, budget, fixed, least_units(cut, criterion), _least_of_towers(prices, units, ranks, criterion), prices.option
        )
        kept, rank_of = found.units, found.ranks
    else:
        kept, rank_of = _apart(units, ranks, budget, fixed, cut, criterion, heads, prices.option)
    layers = [_layer_plan(x, kept.get((x.tower, x.index)), rank_of) for x in anatomy.layers()]
    plan = _with_budget(layers, anatomy, source, criterion, workload, flops, scope, seed)
    plan.budget = plan.budget.model_copy(update={"eps": _mass_lost(ranks, rank_of)})
    if table is not None:
        plan.budget.latency = LatencyBudget(requested=latency, predicted=table.kept(plan), original_ms=table.end_to_end / 1e6)
    return plan


def keep_everything(anatomy: Anatomy, *, source: Source, criterion: Criterion, workload: Workload, scope: Scope, seed: int = 0) -> Plan:
    """The plan that removes nothing."""
    return _with_budget([_layer_plan(x, None, {}) for x in anatomy.layers()], anatomy, source, criterion, workload, 1.0, scope, seed)


def _apart(
    units: list[UnitChoice],
    ranks: list[RankChoice],
    budget: int,
    fixed: int,
    cut: list[Layer],
    criterion: Criterion,
    heads: Mapping[LayerKey, list[int]] | None,
    option: str,
) -> tuple[dict[LayerKey, list[int]], dict[RankKey, int | None]]:
    """Heads first, by a share of the attention or as given; the feed-forwards get exactly what is left."""
    total = fixed + sum(u.cost for u in units) + sum(r.cost(None) for r in ranks)
    if heads is not None:
        kept = {u for u in units if u.group in heads.get(u.layer, [u.group])}
        chosen = "the heads that were chosen"
    else:
        stay, smallest = least_units(cut, criterion), sum(r.cost(r.options()[0]) for r in ranks)
        attention = sum(u.cost for u in units)
        if criterion.head_share is not None:
            allowance, chosen = criterion.head_share * attention, f"criterion.head_share {criterion.head_share:g}"
        else:
            check_reachable(best_units(units, stay), ranks, budget, fixed, total, option=option)
            # The same share of attention and feed-forwards, unless even the smallest ranks need more.
            same = (budget - fixed) / (total - fixed)
            allowance, chosen = min(same * attention, budget - fixed - smallest), None
        by_flop = (criterion.head_ranking or HEAD_RULES[criterion.heads].ranking) == "flops"
        kept = keep_share(units, allowance, stay, by_flop=by_flop)
    left = budget - fixed - sum(u.cost for u in kept)
    check_reachable(list(kept), ranks, budget, fixed, total, chosen, option)
    if criterion.allocation == "ks":
        rank_of = allocate([], ranks, left).ranks
    else:
        rank_of = proportional(ranks, {"uniform": uniform, "d-rank": d_rank}[criterion.allocation](ranks), left)
    return by_layer(kept), rank_of


def units_of(findings: Findings, cut: list[Layer], criterion: Criterion, prices: Prices) -> list[UnitChoice]:
    """Every unit of the layers that may be cut, valued so that the larger is to be kept first."""
    units = []
    for layer in cut:
        key, cost = (layer.tower, layer.index), prices.unit(layer)
        units += [UnitChoice(key, group, criterion.head_weight * s, cost) for group, s in enumerate(findings[key].units)]
    return rank_within_layers(units) if (criterion.head_ranking or HEAD_RULES[criterion.heads].ranking) == "layer" else units


def _ranks(
    findings: Findings, cut: list[Layer], anatomy: Anatomy, criterion: Criterion, workload: Workload, prices: Prices
) -> list[RankChoice]:
    """Every feed-forward matrix of the layers that may be cut, with its spectrum."""
    towers = tower_passes(anatomy, workload)
    ranks = []
    for layer in cut:
        per_mac = 2 * towers[layer.tower].tokens
        for role, linear in layer.ffn.matrices.items():
            ranks.append(
                RankChoice(
                    (layer.tower, layer.index, role),
                    findings[layer.tower, layer.index].spectra[role],
                    per_mac * linear_macs(linear, 1),
                    per_mac * linear_macs(linear),
                    criterion.rank_multiple,
                    criterion.floors.get(layer.tower, Floor()).ranks,
                    prices.matrix(layer, role),
                )
            )
    return ranks


def layers_to_cut(anatomy: Anatomy, workload: Workload, scope: Scope) -> list[Layer]:
    """The layers of a scope; not those of a tower that the workload never runs, as without images: cutting it would save nothing."""
    towers = tower_passes(anatomy, workload)
    return [x for x in anatomy.layers() if scope in ("all", x.tower) and towers[x.tower].tokens]


def least_units(cut: list[Layer], criterion: Criterion) -> dict[LayerKey, int]:
    """How many units of each layer stay at least."""
    floor = {x: criterion.floors.get(x, Floor()).heads for x in TOWERS}
    return {(x.tower, x.index): max(1, math.ceil(floor[x.tower] * x.attention.kv_groups - 1e-9)) for x in cut}


def _least_of_towers(prices: Prices, units: list[UnitChoice], ranks: list[RankChoice], criterion: Criterion) -> dict[str, int]:
    """Tower to the cost of its units and matrices that its floor on the total asks for; towers that have one and are cut."""
    found = {}
    for tower, share in criterion.total_floors.items():
        if choices := sum(u.cost for u in units if u.layer[0] == tower) + sum(r.cost(None) for r in ranks if r.key[0] == tower):
            found[tower] = max(0, math.ceil(share * prices.tower(tower)) - (prices.tower(tower) - choices))
    return found


def _check_seen(cut: list[Layer], findings: Findings, criterion: Criterion) -> None:
    """Refuses to cut a tower of which the calibration data show nothing; it would be emptied."""
    for tower in dict.fromkeys(x.tower for x in cut):
        found = [findings[x.tower, x.index] for x in cut if x.tower == tower]
        if not any(x.seen for x in found):
            other = next(x for x in TOWERS if x != tower)
            raise InputError(
                f"no calibration sample reaches the {tower} tower", mend=f"use questions with images, or --scope {other} to leave it whole"
            )
        if needs_gradients(criterion) and not any(x.felt for x in found):
            raise InputError(
                f"the loss has no gradient in the {tower} tower on the calibration data",
                mend="use other data, or criterion.weighting: activation with criterion.heads: ks-activation in the recipe",
            )


def _mass_lost(ranks: list[RankChoice], chosen: Mapping[RankKey, int | None]) -> dict[str, float] | None:
    """Per tower, the KS distance between the pooled spectra of its feed-forwards and what is kept of them.

    What is kept are some of the pooled values, so the distance over the index is largest at the end: the mass cut off.
    """
    if not all(r.spectrum.size for r in ranks):
        return None
    lost = {}
    for tower in dict.fromkeys(r.key[0] for r in ranks):
        own = [r for r in ranks if r.key[0] == tower]
        total = sum(float(r.spectrum.sum()) for r in own)
        gone = sum(float(r.spectrum[rank:].sum()) for r in own if (rank := chosen[r.key]) is not None)
        lost[tower] = gone / total if total else 0.0
    return lost


def _layer_plan(layer: Layer, kept: list[int] | None, ranks: Mapping[RankKey, int | None]) -> LayerPlan:
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
