"""The budget: met, never overspent, spent on what is worth most, and refused when out of reach."""

import itertools

import numpy as np
import pytest

from infoprune_export.compress.allocate import RankChoice, UnitChoice, allocate
from infoprune_export.errors import InputError


def _problem(seed=0, multiple=1):
    rng = np.random.default_rng(seed)
    units = [UnitChoice(("vision", i), g, float(rng.uniform(0, 3)), 30) for i in range(2) for g in range(2)]
    ranks = [RankChoice(("vision", i, "up"), np.sort(rng.exponential(1, 8))[::-1], 10, 60, multiple) for i in range(2)]
    return units, ranks


def _value(units, ranks, found):
    kept = sum(u.value for u in units if u.group in found.units.get(u.layer, []))
    return kept + sum(r.spectrum[: found.ranks[r.key]].sum() for r in ranks)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [100, 130, 171, 200, 239])
def test_comes_within_one_step_of_the_best_of_all_choices(seed, budget):
    units, ranks = _problem(seed)
    found = allocate(units, ranks, budget)
    assert found.cost <= budget
    best = 0.0
    for groups in itertools.product([[0], [1], [0, 1]], repeat=2):
        for picks in itertools.product([1, 2, 3, 4, 5, None], repeat=2):
            cost = 30 * sum(map(len, groups)) + sum(60 if p is None else 10 * p for p in picks)
            if cost <= budget:
                value = sum(u.value for u in units if u.group in groups[u.layer[1]])
                best = max(best, value + sum(r.spectrum[:p].sum() for r, p in zip(ranks, picks, strict=True)))
    step = max(u.value for u in units)
    assert best - step <= _value(units, ranks, found) <= best + 1e-9


def test_ranks_are_multiples_and_cheaper_than_dense():
    units, ranks = _problem(multiple=2)
    for budget in range(100, 240, 10):
        for r in allocate(units, ranks, budget).ranks.values():
            assert r is None or (r % 2 == 0 and 10 * r < 60)


def test_everything_stays_when_the_budget_allows():
    units, ranks = _problem()
    found = allocate(units, ranks, 240)
    assert found.cost == 240
    assert set(found.ranks.values()) == {None}
    assert found.units == {("vision", 0): [0, 1], ("vision", 1): [0, 1]}


def test_every_layer_keeps_a_unit():
    units, ranks = _problem()
    found = allocate(units, ranks, 80)
    assert all(len(g) == 1 for g in found.units.values())


def test_floors_hold_before_anything_else():
    units, ranks = _problem()
    floored = [RankChoice(r.key, r.spectrum, r.cost_per_rank, r.dense_cost, r.multiple, floor=0.5) for r in ranks]
    found = allocate(units, floored, 150, stay={("vision", 1): 2})
    assert found.units[("vision", 1)] == [0, 1]
    assert set(found.ranks.values()) == {3}
    with pytest.raises(InputError, match=r"the floors and the smallest ranks still keep 0\.625") as refused:
        allocate(units, floored, 149, stay={("vision", 1): 2})
    assert "lower criterion.floors" in refused.value.mend


def test_what_the_units_do_not_compete_for_goes_to_the_ranks():
    _, ranks = _problem()
    assert allocate([], ranks, 60).cost == 60


def test_out_of_reach_names_what_is_reachable():
    units, ranks = _problem()
    with pytest.raises(InputError, match=r"--flops 0\.334"):
        allocate(units, ranks, 79)


def test_the_same_problem_gives_the_same_allocation():
    assert allocate(*_problem(3), 150) == allocate(*_problem(3), 150)
