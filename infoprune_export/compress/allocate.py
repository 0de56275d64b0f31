"""One budget for heads and ranks of both towers: most spectral mass kept per FLOP.

Every choice has a value (loss-scaled spectral mass, see heads.py and lowrank.py) and a cost in FLOPs. For a
price per FLOP each unit is kept if its value exceeds its cost, and each matrix takes the rank, or stays dense,
whichever is worth most; the price is bisected until the budget is met, and what rounding leaves over is spent
on the best single steps that still fit. A knapsack solved by Lagrangian relaxation: exact up to one step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from infoprune_export.errors import InputError


@dataclass(frozen=True)
class UnitChoice:
    """A KV group of one layer: keep or remove."""

    layer: tuple[str, int]
    group: int
    value: float
    cost: int


@dataclass(frozen=True)
class RankChoice:
    """A matrix: a rank that is a multiple of `multiple`, or dense.

    Attributes:
        key: (tower, layer, role).
        spectrum: Singular values, descending, shape [min(d_in, d_out)].
        cost_per_rank: FLOPs of one rank-one component.
        dense_cost: FLOPs of the whole matrix.
        multiple: Ranks are multiples of this.
    """

    key: tuple[str, int, str]
    spectrum: np.ndarray = field(repr=False)
    cost_per_rank: int
    dense_cost: int
    multiple: int

    def ranks(self) -> np.ndarray:
        """Ranks that are cheaper than the dense matrix, ascending; at least one."""
        top = (self.dense_cost - 1) // self.cost_per_rank
        step = min(self.multiple, max(1, top))
        return np.arange(step, max(top, 1) + 1, step)


@dataclass
class Allocation:
    units: dict[tuple[str, int], list[int]]
    ranks: dict[tuple[str, int, str], int | None]
    cost: int


class _Matrix:
    """Options of one matrix in order of cost: value and cost arrays, dense last."""

    def __init__(self, choice: RankChoice):
        ranks = choice.ranks()
        mass = np.cumsum(choice.spectrum)
        self.key = choice.key
        self.ranks: list[int | None] = [*map(int, ranks), None]
        self.values = np.append(mass[np.minimum(ranks, len(mass)) - 1], mass[-1])
        self.costs = np.append(ranks * choice.cost_per_rank, choice.dense_cost).astype(np.int64)

    def best(self, price: float) -> int:
        """Index of the option worth most at a price; the cheaper one of equals."""
        return int(np.argmax(self.values - price * self.costs))


def allocate(units: list[UnitChoice], ranks: list[RankChoice], budget: int, fixed: int = 0) -> Allocation:
    """Spends a budget.

    Args:
        units: Every removable unit; the best of each layer always stays.
        ranks: Every matrix.
        budget: FLOPs allowed, over the same scope as the costs.
        fixed: FLOPs that no choice changes.

    Raises:
        InputError: the least that can be reached is above the budget.
    """
    matrices = [_Matrix(c) for c in ranks]
    floor = _floor_units(units)
    least = fixed + sum(u.cost for u in floor.values()) + sum(int(m.costs[0]) for m in matrices)
    if least > budget:
        total = fixed + sum(u.cost for u in units) + sum(int(m.costs[-1]) for m in matrices)
        raise InputError(
            f"a budget of {budget / total:.3f} cannot be reached: "
            f"one head group in every layer and the smallest ranks still keep {least / total:.3f}",
            mend=f"ask for --flops {np.ceil(1000 * least / total) / 1000:.3f} or more, or widen --scope",
        )

    def at(price: float) -> tuple[set[UnitChoice], list[int]]:
        kept = {u for u in units if u.value > price * u.cost} | set(floor.values())
        return kept, [m.best(price) for m in matrices]

    def cost(kept: set[UnitChoice], picks: list[int]) -> int:
        return fixed + sum(u.cost for u in kept) + sum(int(m.costs[i]) for m, i in zip(matrices, picks, strict=True))

    low, high = 0.0, 1.0
    while cost(*at(high)) > budget:
        high *= 2
    if cost(*at(low)) > budget:
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(*at(middle)) > budget else (low, middle)
    else:
        high = low
    kept, picks = at(high)
    _spend_rest(units, matrices, kept, picks, budget - cost(kept, picks))
    by_layer: dict[tuple[str, int], list[int]] = {}
    for unit in sorted(kept, key=lambda u: (u.layer, u.group)):
        by_layer.setdefault(unit.layer, []).append(unit.group)
    return Allocation(by_layer, {m.key: m.ranks[i] for m, i in zip(matrices, picks, strict=True)}, cost(kept, picks))


def _floor_units(units: list[UnitChoice]) -> dict[tuple[str, int], UnitChoice]:
    """The best unit of each layer, which always stays."""
    best: dict[tuple[str, int], UnitChoice] = {}
    for unit in units:
        if unit.layer not in best or unit.value > best[unit.layer].value:
            best[unit.layer] = unit
    return best


def _spend_rest(units: list[UnitChoice], matrices: list[_Matrix], kept: set[UnitChoice], picks: list[int], rest: int) -> None:
    """Adds the best steps by value per FLOP that still fit, in place, until none does."""
    while True:
        steps: list[tuple[float, int, UnitChoice | int]] = [
            (u.value / u.cost, u.cost, u) for u in units if u not in kept and 0 < u.cost <= rest
        ]
        for n, m in enumerate(matrices):
            i = picks[n]
            if i + 1 < len(m.costs) and 0 < (extra := int(m.costs[i + 1] - m.costs[i])) <= rest:
                steps.append(((m.values[i + 1] - m.values[i]) / extra, extra, n))
        if not steps:
            return
        _, extra, step = max(steps, key=lambda s: s[0])
        rest -= extra
        if isinstance(step, UnitChoice):
            kept.add(step)
        else:
            picks[step] += 1
