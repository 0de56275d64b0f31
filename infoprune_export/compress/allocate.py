"""One budget for heads and ranks of both towers: most spectral mass kept per FLOP, or per nanosecond.

Every choice has a value (loss-scaled spectral mass, see heads.py and lowrank.py) and a cost (see prices.py). For a
price per unit of cost each unit is kept if its value exceeds its cost, and each matrix takes the rank, or stays dense,
whichever is worth most; the price is bisected until the budget is met, and what rounding leaves over is spent
on the best single steps that still fit. A knapsack solved by Lagrangian relaxation: exact up to one step.

Allocations that fix the shares instead of comparing values are in shares.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from infoprune_export.errors import InputError

LayerKey = tuple[str, int]
"""(tower, index)."""


@dataclass(frozen=True)
class UnitChoice:
    """A KV group of one layer: keep or remove."""

    layer: LayerKey
    group: int
    value: float
    cost: int


@dataclass(frozen=True)
class Measured:
    """What a matrix costs where that is not its FLOPs.

    Attributes:
        cost: Of a rank, or of the dense matrix (None); a larger rank never costs less.
        largest: The largest rank that has a cost.
    """

    cost: Callable[[int | None], int]
    largest: int


@dataclass(frozen=True)
class RankChoice:
    """A matrix: a rank that is a multiple of `multiple`, or dense.

    Attributes:
        key: (tower, layer, role).
        spectrum: Singular values, descending, shape [min(d_in, d_out)]; empty where the allocation asks for none.
        cost_per_rank: FLOPs of one rank-one component.
        dense_cost: FLOPs of the whole matrix.
        multiple: Ranks are multiples of this.
        floor: Share of the dense matrix's FLOPs that is kept at least.
        measured: What it costs, where a budget is not in FLOPs.
    """

    key: tuple[str, int, str]
    spectrum: np.ndarray = field(repr=False)
    cost_per_rank: int
    dense_cost: int
    multiple: int
    floor: float = 0.0
    measured: Measured | None = None

    @property
    def break_even(self) -> float:
        """The rank, a fraction, at which a pair has the FLOPs of the dense matrix."""
        return self.dense_cost / self.cost_per_rank

    def options(self) -> list[int | None]:
        """What can be chosen, by cost: ranks from the floor on that are cheaper than the dense matrix, then None for dense."""
        top = (self.dense_cost - 1) // self.cost_per_rank
        step = min(self.multiple, max(1, top))
        least = self.floor * self.break_even
        if self.measured is not None:
            dense = self.cost(None)
            return [*(r for r in range(step, self.measured.largest + 1, step) if r >= least and self.cost(r) < dense), None]
        return [*(r for r in range(step, max(top, 1) + 1, step) if r >= least), None]

    def cost(self, rank: int | None) -> int:
        """In the currency of the budget."""
        if self.measured is not None:
            return self.measured.cost(rank)
        return self.dense_cost if rank is None else rank * self.cost_per_rank


@dataclass
class Allocation:
    units: dict[LayerKey, list[int]]
    ranks: dict[tuple[str, int, str], int | None]
    cost: int


class _Matrix:
    """Options of one matrix in order of cost: value and cost arrays, dense last."""

    def __init__(self, choice: RankChoice):
        mass = np.cumsum(choice.spectrum)
        self.key, self.ranks = choice.key, choice.options()
        self.values = np.array([mass[-1 if r is None else min(r, len(mass)) - 1] for r in self.ranks])
        self.costs = np.array([choice.cost(r) for r in self.ranks], dtype=np.int64)

    def best(self, price: float) -> int:
        """Index of the option worth most at a price; the cheaper one of equals."""
        return int(np.argmax(self.values - price * self.costs))


def allocate(
    units: list[UnitChoice],
    ranks: list[RankChoice],
    budget: int,
    fixed: int = 0,
    stay: Mapping[LayerKey, int] | None = None,
    option: str = "--flops",
) -> Allocation:
    """Spends a budget.

    Args:
        units: Every unit that may be removed.
        ranks: Every matrix.
        budget: Cost allowed, over the same scope as the costs.
        fixed: Cost that no choice changes.
        stay: How many units of a layer stay at least, the best ones; 1 where a layer is not named.
        option: Of the command line, by which such a budget is asked for; for the message of the error.

    Raises:
        InputError: the least that can be reached is above the budget.
    """
    matrices = [_Matrix(c) for c in ranks]
    floor = best_units(units, stay or {})
    check_reachable(floor, ranks, budget, fixed, fixed + sum(u.cost for u in units) + sum(c.cost(None) for c in ranks), option=option)

    def at(price: float) -> tuple[set[UnitChoice], list[int]]:
        kept = {u for u in units if u.value > price * u.cost} | set(floor)
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
    picked = {m.key: m.ranks[i] for m, i in zip(matrices, picks, strict=True)}
    return Allocation(by_layer(kept), picked, cost(kept, picks))


def allocate_with_floors(
    units: list[UnitChoice],
    ranks: list[RankChoice],
    budget: int,
    fixed: int,
    stay: Mapping[LayerKey, int],
    least: Mapping[str, int],
    option: str = "--flops",
) -> Allocation:
    """Spends a budget of which some towers get at least a part; a tower that would get less has a price of its own.

    Args:
        units: See `allocate`; likewise the next ones.
        ranks: Every matrix.
        budget: Cost allowed.
        fixed: Cost that no choice changes.
        stay: How many units of a layer stay at least.
        least: Tower to cost of its units and matrices that stay at least; it gets them to the next whole step.
        option: See `allocate`.

    Raises:
        InputError: the least that can be reached is above the budget.
    """
    found = allocate(units, ranks, budget, fixed, stay, option)

    def of(tower: str, other: bool = False) -> tuple[list[UnitChoice], list[RankChoice]]:
        return [u for u in units if (u.layer[0] == tower) != other], [c for c in ranks if (c.key[0] == tower) != other]

    def spent(tower: str, by: Allocation) -> int:
        own_units, own_ranks = of(tower)
        return sum(u.cost for u in own_units if u.group in by.units[u.layer]) + sum(c.cost(by.ranks[c.key]) for c in own_ranks)

    for tower, wanted in least.items():
        own_units, own_ranks = of(tower)
        every = [u.cost for u in own_units] + [c.cost(None) for c in own_ranks]
        if spent(tower, found) >= (wanted := min(wanted, sum(every))):
            continue
        inside, allowance, step = None, wanted, min([u.cost for u in own_units] + [_step(c) for c in own_ranks])
        while inside is None or inside.cost < wanted:
            inside, allowance = allocate(own_units, own_ranks, allowance, 0, stay), allowance + step
        other_units, other_ranks = of(tower, other=True)
        smallest = sum(u.cost for u in best_units(other_units, stay)) + sum(c.cost(c.options()[0]) for c in other_ranks)
        behind = max(smallest, *(x for name, x in least.items() if name != tower), 0)
        if inside.cost + behind + fixed > budget:
            total = fixed + sum(u.cost for u in units) + sum(c.cost(None) for c in ranks)
            kept = (inside.cost + behind + fixed) / total
            raise InputError(
                f"a budget of {budget / total:.3f} cannot be reached: criterion.floors and the smallest ranks still keep {kept:.3f}",
                mend=f"ask for {option} {np.ceil(1000 * kept) / 1000:.3f} or more, or lower criterion.floors.{tower}.total",
            )
        outside = allocate(other_units, other_ranks, budget - inside.cost, fixed, stay)
        return Allocation(inside.units | outside.units, inside.ranks | outside.ranks, inside.cost + outside.cost)
    return found


def _step(choice: RankChoice) -> int:
    """About what the next option costs more than one."""
    return choice.cost_per_rank if choice.measured is None else max(1, choice.cost(None) // len(choice.options()))


def best_units(units: list[UnitChoice], stay: Mapping[LayerKey, int]) -> list[UnitChoice]:
    """The best units of each layer, which always stay: as many as `stay` says, one where it is silent."""
    layers: dict[LayerKey, list[UnitChoice]] = {}
    for unit in units:
        layers.setdefault(unit.layer, []).append(unit)
    return [u for key, own in layers.items() for u in sorted(own, key=lambda u: (-u.value, u.group))[: max(1, stay.get(key, 1))]]


def by_layer(kept: set[UnitChoice]) -> dict[LayerKey, list[int]]:
    """Layer to its kept groups, both ascending."""
    found: dict[LayerKey, list[int]] = {}
    for unit in sorted(kept, key=lambda u: (u.layer, u.group)):
        found.setdefault(unit.layer, []).append(unit.group)
    return found


def check_reachable(
    floor: list[UnitChoice],
    ranks: list[RankChoice],
    budget: int,
    fixed: int,
    total: int,
    chosen: str | None = None,
    option: str = "--flops",
) -> None:
    """Refuses a budget below what is left when all that may go is gone.

    Args:
        floor: Units that always stay.
        ranks: Every matrix.
        budget: Cost allowed.
        fixed: Cost that no choice changes.
        total: Cost of the original.
        chosen: What was decided before, where heads are fixed, as words for the message.
        option: See `allocate`.

    Raises:
        InputError: naming the least that can be reached.
    """
    least = fixed + sum(u.cost for u in floor) + sum(c.cost(c.options()[0]) for c in ranks)
    if least <= budget:
        return
    floors = any(c.floor for c in ranks) or len(floor) > len({u.layer for u in floor})
    heads = chosen or ("the floors" if floors else "one head group in every layer")
    lower = "lower criterion.floors" if floors else "widen --scope"
    raise InputError(
        f"a budget of {budget / total:.3f} cannot be reached: {heads} and the smallest ranks still keep {least / total:.3f}",
        mend=f"ask for {option} {np.ceil(1000 * least / total) / 1000:.3f} or more, or {'keep fewer heads' if chosen else lower}",
    )


def _spend_rest(units: list[UnitChoice], matrices: list[_Matrix], kept: set[UnitChoice], picks: list[int], rest: int) -> None:
    """Adds the best steps by value per cost that still fit, in place, until none does."""
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
