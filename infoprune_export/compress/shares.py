"""Allocations that fix shares: which heads make up a share of the attention, and ranks in given proportions.

`keep_share` cuts a ranking of units at a share of their FLOPs. `proportional` gives every matrix a rank in
proportion to a direction, capped at dense, scaled until the budget is met: with break-even ranks as the direction
every matrix keeps the same share of its cost (uniform), with `sqrt(R / w)` it is D-Rank's closed form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from infoprune_export.compress.allocate import LayerKey, RankChoice, UnitChoice, best_units
from infoprune_export.compress.information import effective_rank


def rank_within_layers(units: list[UnitChoice]) -> list[UnitChoice]:
    """The same units valued by their place in their own layer, so that a share of the whole is a share of every layer.

    The best of n units gets n / n, the next (n - 1) / n and so on; what is left of the budget goes where a unit has
    the larger part of its layer's score.
    """
    layers: dict[LayerKey, list[UnitChoice]] = {}
    for unit in units:
        layers.setdefault(unit.layer, []).append(unit)
    placed = []
    for own in layers.values():
        scale = sum(abs(u.value) for u in own) or 1.0
        for place, unit in enumerate(sorted(own, key=lambda u: (-u.value, u.group))):
            # The score only breaks ties: 1e-6 is less than the distance between two places.
            placed.append(replace(unit, value=(len(own) - place) / len(own) + 1e-6 * unit.value / scale))
    return placed


def keep_share(units: list[UnitChoice], allowance: float, stay: Mapping[LayerKey, int], *, by_flop: bool = False) -> set[UnitChoice]:
    """The best units that cost no more than an allowance; what must stay stays, even above it.

    Args:
        units: Every unit.
        allowance: FLOPs.
        stay: How many units of a layer stay at least; 1 where a layer is not named.
        by_flop: Whether the best are those with the highest score per FLOP, and not the highest score.
    """
    kept = set(best_units(units, stay))
    spent = sum(u.cost for u in kept)
    for unit in sorted(units, key=lambda u: (-u.value / (u.cost if by_flop else 1), u.layer, u.group)):
        if unit in kept:
            continue
        if spent + unit.cost > allowance:
            break  # one threshold: nothing that scores less gets in because it is cheaper
        kept.add(unit)
        spent += unit.cost
    return kept


def uniform(ranks: list[RankChoice]) -> np.ndarray:
    """Direction of equal shares: a rank of `share * d_in d_out / (d_in + d_out)` keeps that share of a matrix's FLOPs."""
    return np.array([c.break_even for c in ranks])


def d_rank(ranks: list[RankChoice]) -> np.ndarray:
    """Direction that minimises `sum_g R_g / k_g` under `sum_g k_g w_g = budget`: `k_g ~ sqrt(R_g / w_g)`.

    `R_g` is the effective rank of the matrix's spectrum with `p = s^2 / sum s^2`, `w_g` its cost per rank
    (D-Rank, arXiv 2509.25622, with every matrix a group of its own).
    """
    return np.array([np.sqrt(effective_rank(c.spectrum**2) / c.cost_per_rank) for c in ranks])


def proportional(ranks: list[RankChoice], direction: np.ndarray, budget: int) -> dict[tuple[str, int, str], int | None]:
    """Ranks in proportion to a direction, rounded, and the budget met from below.

    Args:
        ranks: Every matrix.
        direction: Wanted proportions, non-negative, shape [matrices].
        budget: FLOPs for all of them together; at least the cost of their smallest options.

    Returns:
        Key to rank, None for dense.
    """
    options = [c.options() for c in ranks]
    caps, prices = np.array([c.break_even for c in ranks]), np.array([c.cost_per_rank for c in ranks], dtype=np.float64)
    lowest = np.array([c.cost(o[0]) / c.cost_per_rank for c, o in zip(ranks, options, strict=True)])

    def target(scale: float) -> np.ndarray:
        return np.clip(scale * direction, lowest, caps)

    low, high = 0.0, max((c / d for c, d in zip(caps, direction, strict=True) if d > 0), default=1.0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if target(middle) @ prices > budget else (middle, high)
    wanted = target(high if target(high) @ prices <= budget else low)
    picks = [
        max(i for i, r in enumerate(own) if i == 0 or (caps[n] if r is None else r) <= wanted[n] * (1 + 1e-9))
        for n, own in enumerate(options)
    ]
    rest = budget - sum(c.cost(own[i]) for c, own, i in zip(ranks, options, picks, strict=True))
    while True:
        steps = []
        for n, (choice, own) in enumerate(zip(ranks, options, strict=True)):
            if picks[n] + 1 < len(own):
                now, extra = own[picks[n]], choice.cost(own[picks[n] + 1]) - choice.cost(own[picks[n]])
                if extra <= rest:
                    steps.append(((wanted[n] - now) / wanted[n], -n, extra))
        if not steps:
            return {c.key: own[i] for c, own, i in zip(ranks, options, picks, strict=True)}
        _, n, extra = max(steps)
        picks[-n] += 1
        rest -= extra
