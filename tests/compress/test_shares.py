"""Fixed shares: closed forms, one threshold, budgets met from below."""

import itertools

import numpy as np
import pytest

from infoprune_export.compress.allocate import RankChoice, UnitChoice
from infoprune_export.compress.shares import d_rank, keep_share, proportional, rank_within_layers, uniform


def _ranks(multiple=1, floor=0.0, seed=0):
    rng = np.random.default_rng(seed)
    sizes = [(40, 60), (60, 40), (100, 100), (30, 200)]
    return [
        RankChoice(("vision", i, "up"), np.sort(rng.exponential(1, min(s)) ** (i + 1))[::-1], sum(s), s[0] * s[1], multiple, floor)
        for i, s in enumerate(sizes)
    ]


def _cost(ranks, found):
    return sum(r.cost(found[r.key]) for r in ranks)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_uniform_keeps_the_same_share_of_every_matrix(share):
    ranks = _ranks()
    found = proportional(ranks, uniform(ranks), int(share * sum(r.dense_cost for r in ranks)))
    for r in ranks:
        assert found[r.key] == pytest.approx(share * r.dense_cost / r.cost_per_rank, abs=1)


def test_d_rank_is_the_minimum_of_information_per_rank_under_the_budget():
    """Brute force over all pairs of ranks that fill the budget."""
    ranks = [RankChoice(("vision", i, "up"), s, 10, 10_000, 1) for i, s in enumerate([np.ones(400), np.array([1.0] * 25 + [0.0] * 375)])]
    information = [400, 25]
    found = proportional(ranks, d_rank(ranks), 5_000)
    best = min(range(1, 500), key=lambda k: information[0] / k + information[1] / (500 - k))
    assert found[("vision", 0, "up")] == pytest.approx(best, abs=1)
    assert found[("vision", 0, "up")] == pytest.approx(4 * found[("vision", 1, "up")], abs=4)  # sqrt(400 / 25)


def test_d_rank_squares_the_spectrum_before_the_entropy():
    (choice,) = [RankChoice(("vision", 0, "up"), np.array([2.0, 1.0]), 1, 9, 1)]
    p = np.array([0.8, 0.2])
    assert d_rank([choice])[0] == pytest.approx(np.sqrt(np.exp(-(p * np.log(p)).sum())))


def test_what_a_capped_matrix_leaves_goes_to_the_others():
    ranks = [RankChoice(("vision", i, "up"), np.ones(50), 10, 200, 1) for i in range(2)]
    found = proportional(ranks, np.array([100.0, 1.0]), 300)
    assert found == {("vision", 0, "up"): None, ("vision", 1, "up"): 10}


@pytest.mark.parametrize(("rule", "multiple", "floor"), list(itertools.product([uniform, d_rank], [1, 8], [0.0, 0.3])))
def test_budgets_are_met_from_below_and_floors_hold(rule, multiple, floor):
    ranks = _ranks(multiple, floor)
    dense, least = sum(r.dense_cost for r in ranks), sum(r.cost(r.options()[0]) for r in ranks)
    for budget in np.linspace(least, dense, 30).astype(int):
        found = proportional(ranks, rule(ranks), int(budget))
        spent = _cost(ranks, found)
        assert spent <= budget
        for r in ranks:
            assert found[r.key] is None or (found[r.key] % multiple == 0 and r.cost(found[r.key]) >= floor * r.dense_cost)
            options = r.options()
            if found[r.key] is not None:  # not even the smallest step fits any more
                assert spent + r.cost(options[options.index(found[r.key]) + 1]) - r.cost(found[r.key]) > budget
    assert set(proportional(ranks, rule(ranks), dense).values()) == {None}


def test_spectra_without_any_mass_still_fill_the_budget():
    ranks = [RankChoice(("vision", i, "up"), np.zeros(50), 10, 200, 1) for i in range(3)]
    found = proportional(ranks, d_rank(ranks), 300)
    assert 290 < _cost(ranks, found) <= 300


def _units(values, cost=10):
    return [UnitChoice(("vision", i), g, v, cost) for i, layer in enumerate(values) for g, v in enumerate(layer)]


def test_a_share_keeps_the_best_units_of_the_whole_model():
    kept = keep_share(_units([[9, 8, 7, 1], [3, 2, 1, 0]]), 40, {})
    assert {(u.layer[1], u.group) for u in kept} == {(0, 0), (0, 1), (0, 2), (1, 0)}


def test_a_share_by_flop_goes_to_what_is_cheap_for_its_score():
    units = [
        UnitChoice(("vision", i), g, v, cost) for i, cost, values in ((0, 30, (4, 3)), (1, 10, (2, 1.9))) for g, v in enumerate(values)
    ]
    assert {(u.layer[1], u.group) for u in keep_share(units, 50, {})} == {(0, 0), (1, 0)}
    assert {(u.layer[1], u.group) for u in keep_share(units, 50, {}, by_flop=True)} == {(0, 0), (1, 0), (1, 1)}


def test_every_layer_keeps_what_its_floor_says():
    kept = keep_share(_units([[9, 8, 7, 6], [3, 2, 1, 0]]), 40, {("vision", 1): 2})
    assert {(u.layer[1], u.group) for u in kept} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_within_layers_every_layer_keeps_the_same_share():
    units = rank_within_layers(_units([[900, 800, 700, 600], [3, 2, 1, 0]]))
    kept = keep_share(units, 40, {})
    assert {(u.layer[1], u.group) for u in kept} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_the_odd_unit_goes_to_the_layer_that_leans_on_it_most():
    units = rank_within_layers(_units([[5, 5], [9, 1], [6, 5]]))
    kept = keep_share(units, 40, {})
    assert {(u.layer[1], u.group) for u in kept} == {(0, 0), (1, 0), (2, 0), (0, 1)}
