"""Every combination of choices, from statistics to a network: within the budget, finite, repeatable, or refused in words."""

import itertools

import numpy as np
import pytest
import torch
from networks import batches, build, inputs

from infoprune_export.compress.decide import decide, layers_to_cut
from infoprune_export.compress.evidence import gather_for, gather_task
from infoprune_export.compress.factors import make_factors
from infoprune_export.compress.findings import look_at_all
from infoprune_export.compress.scores import HEAD_RULES
from infoprune_export.compress.statistics import gather
from infoprune_export.errors import InputError
from infoprune_export.inspect import plan_tables
from infoprune_export.models.anatomy import site
from infoprune_export.models.families import find_anatomy
from infoprune_export.models.flops import attention_flops, count, tower_passes
from infoprune_export.plans import Plan, Source
from infoprune_export.recipe import Criterion, Workload

WORKLOAD = Workload(image_tokens=16, text_tokens=5, new_tokens=3)
WEIGHTINGS = ("loss", "activation", "asvd", "none")
ALLOCATIONS = ("ks", "uniform", "d-rank")
PUBLISHED = {
    "random": {"heads": "random", "weighting": "none", "allocation": "uniform", "compensate": "none"},
    "magnitude": {"heads": "magnitude", "weighting": "none", "allocation": "uniform", "compensate": "none"},
    "michel": {"heads": "michel", "weighting": "activation", "allocation": "uniform", "compensate": "none"},
    "taylor": {"heads": "taylor", "weighting": "asvd", "allocation": "uniform", "compensate": "none"},
    "flap": {"heads": "flap", "weighting": "activation", "allocation": "uniform", "compensate": "bias"},
    "wanda-sp": {"heads": "wanda-sp", "weighting": "activation", "allocation": "d-rank", "compensate": "none"},
}


def everything_of(network, data):
    """Statistics that serve every criterion."""
    anatomy = find_anatomy(network)
    stats = gather(network, anatomy, data, scales=True, temperature=2.0)
    stats.task = gather_task(network, anatomy, data, gates=True, weights=True)
    return stats


@pytest.fixture(scope="module")
def network():
    return build()


@pytest.fixture(scope="module")
def data():
    return batches()


@pytest.fixture(scope="module")
def everything(network, data):
    return everything_of(network, data)


def plan_of(network, stats, choices=None, *, flops=0.5, scope="all", kept=None, seed=0) -> Plan:
    anatomy, criterion = find_anatomy(network), Criterion(**{"rank_multiple": 2, **(choices or {})})
    return decide(
        look_at_all(network, anatomy, stats, criterion, seed),
        anatomy,
        source=Source(id="random", sha256="0" * 64),
        criterion=criterion,
        workload=WORKLOAD,
        flops=flops,
        scope=scope,
        heads=kept,
        seed=seed,
    )


def attention_share(plan):
    """Share of the attention FLOPs that a plan keeps."""
    towers, layers = tower_passes(plan.anatomy, WORKLOAD), list(plan.anatomy.layers())
    cost = lambda x, groups: attention_flops(x, groups * x.attention.heads_per_group, groups, towers[x.tower])
    kept = sum(cost(x, len(plan.decision(x.tower, x.index).kv_groups)) for x in layers)
    return kept / sum(cost(x, x.attention.kv_groups) for x in layers)


@pytest.mark.parametrize(("rule", "weight", "allocation"), list(itertools.product(HEAD_RULES, WEIGHTINGS, ALLOCATIONS)))
def test_every_combination_meets_its_budget_from_below_and_repeats(network, everything, rule, weight, allocation):
    choices = {"heads": rule, "weighting": weight, "allocation": allocation}
    step = 0.04 if Criterion(**choices).one_currency else 0.01  # a unit may be all that is left to add: 0.037 of this network
    plans = [plan_of(network, everything, choices, flops=f) for f in (0.8, 0.5, 0.5)]
    assert 0.8 - step < plans[0].budget.predicted <= 0.8
    assert 0.5 - step < plans[1].budget.predicted <= 0.5
    assert plans[1] == plans[2]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_pairs_give_a_network_that_answers(name, data):
    network = build()
    criterion = Criterion(rank_multiple=2, **PUBLISHED[name])
    stats = gather_for(criterion, network, find_anatomy(network), data)
    plan = plan_of(network, stats, PUBLISHED[name])
    factors = make_factors(network, plan, data, stats)
    assert all(np.isfinite(f).all() for f in factors.values())
    assert torch.isfinite(network(**inputs()).logits).all()
    assert any(len(d.kv_groups) < (4 if d.tower == "vision" else 3) for d in plan.layers)


@pytest.mark.parametrize("state", ["one sample", "dead channels", "silent layer"])
@pytest.mark.parametrize("weight", WEIGHTINGS)
def test_poor_data_never_gives_nan(weight, state):
    network, data = build(), batches(1 if state == "one sample" else 4)
    layer = find_anatomy(network).language.layers[1]
    if state == "dead channels":
        network.get_submodule(layer.attention.v.path).weight[::2] = 0
        network.get_submodule(layer.ffn.up.path).weight[::2] = 0
    elif state == "silent layer":
        network.get_submodule(layer.attention.o.path).weight.zero_()
        network.get_submodule(layer.ffn.down.path).weight.zero_()
    stats = everything_of(network, data)
    for rule, allocation in itertools.product(HEAD_RULES, ALLOCATIONS):
        plan = plan_of(network, stats, {"heads": rule, "weighting": weight, "allocation": allocation})
        assert 0.47 < plan.budget.predicted <= 0.5
    factors = make_factors(network, plan, data, stats)
    assert all(np.isfinite(f).all() for f in factors.values())
    assert torch.isfinite(network(**inputs()).logits).all()


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("choices", [{}, PUBLISHED["flap"], PUBLISHED["wanda-sp"]])
def test_head_share_is_the_attention_that_stays_and_the_rest_of_the_budget_goes_to_ranks(network, everything, choices, share):
    plan = plan_of(network, everything, {**choices, "head_share": share}, flops=0.6)
    assert share - 0.12 < attention_share(plan) <= max(share, 0.34)  # units are coarse, and one a layer stays
    assert 0.59 < plan.budget.predicted <= 0.6


def test_without_a_head_share_baselines_keep_the_same_share_of_both(network, everything):
    plan = plan_of(network, everything, PUBLISHED["flap"], flops=0.6)
    ffn = [
        plan.decision(x.tower, x.index).ranks[r] / (m.d_in * m.d_out / (m.d_in + m.d_out))
        for x in plan.anatomy.layers()
        for r, m in x.ffn.matrices.items()
    ]
    assert attention_share(plan) == pytest.approx(np.mean(ffn), abs=0.1)


def test_one_currency_only_where_both_are_in_the_same_units():
    assert Criterion().one_currency
    assert Criterion(heads="ks-activation", weighting="activation").one_currency
    for other in (
        {"heads": "flap"},
        {"head_ranking": "layer"},
        {"weighting": "asvd"},
        {"allocation": "uniform"},
        {"heads": "ks", "weighting": "activation"},
    ):
        assert not Criterion(**other).one_currency


def test_the_head_rule_that_draws_follows_the_seed(network, everything):
    one, same, other = (plan_of(network, everything, PUBLISHED["random"], seed=s).layers for s in (1, 1, 2))
    assert one == same
    assert one != other


def test_rankings_can_be_chosen(network, everything):
    for ranking, spread in (("layer", 1), ("global", 3)):
        plan = plan_of(network, everything, {**PUBLISHED["wanda-sp"], "head_ranking": ranking})
        kept = [len(d.kv_groups) for d in plan.layers if d.tower == "vision"]
        assert max(kept) - min(kept) <= spread


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_heads_that_were_chosen_stay_as_they_are(network, everything, allocation):
    kept = {("vision", 0): [1, 3], ("vision", 1): [0], ("language", 0): [2], ("language", 2): [0, 1]}
    plan = plan_of(network, everything, {"allocation": allocation}, kept=kept, flops=0.6)
    for d in plan.layers:
        assert d.kv_groups == kept.get((d.tower, d.layer), list(range(3 if d.tower == "language" else len(d.kv_groups))))
    assert plan.decision("language", 0).heads == [4, 5]
    assert 0.59 < plan.budget.predicted <= 0.6


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_floors_hold_for_every_layer_of_their_tower(network, everything, allocation):
    floors = {"vision": {"heads": 0.7, "ranks": 0.4}}
    plan = plan_of(network, everything, {"allocation": allocation, "floors": floors, "rank_multiple": 1}, flops=0.5)
    for layer in plan.anatomy.vision.layers:
        decision = plan.decision("vision", layer.index)
        assert len(decision.kv_groups) >= 3
        for role, m in layer.ffn.matrices.items():
            assert decision.ranks[role] is None or decision.ranks[role] * (m.d_in + m.d_out) >= 0.4 * m.d_in * m.d_out


@pytest.mark.parametrize("tower", ["vision", "language"])
def test_a_tower_keeps_its_floor_in_total_and_the_other_pays(network, everything, tower):
    def kept(plan):
        return {t: count(plan.anatomy, WORKLOAD, plan).over(t) / count(plan.anatomy, WORKLOAD).over(t) for t in ("vision", "language")}

    free = plan_of(network, everything)
    asked = min(1.0, kept(free)[tower] + 0.05)
    other = "language" if tower == "vision" else "vision"
    plan = plan_of(network, everything, {"floors": {tower: {"total": asked}}})
    assert asked <= kept(plan)[tower] < asked + 0.1
    assert kept(plan)[other] < kept(free)[other]
    assert 0.46 < plan.budget.predicted <= 0.5
    loose = plan_of(network, everything, {"floors": {tower: {"total": 0.05}}})
    assert [d.model_dump() for d in loose.layers] == [d.model_dump() for d in free.layers]
    with pytest.raises(InputError, match=r"criterion\.floors and the smallest ranks still keep") as refused:
        plan_of(network, everything, {"floors": {tower: {"total": 1.0}}}, flops=0.3)
    least = float(refused.value.mend.split("--flops ")[1].split()[0])
    assert kept(plan_of(network, everything, {"floors": {tower: {"total": 1.0}}}, flops=least))[tower] == 1.0


@pytest.mark.parametrize("choices", [{}, *PUBLISHED.values(), {"floors": {"language": {"heads": 1, "ranks": 0.5}}}])
def test_the_least_that_is_named_is_the_least_that_works(network, everything, choices):
    with pytest.raises(InputError, match="cannot be reached") as refused:
        plan_of(network, everything, choices, flops=0.05)
    least = float(refused.value.mend.split("--flops ")[1].split()[0])
    assert plan_of(network, everything, choices, flops=least).budget.predicted <= least
    with pytest.raises(InputError, match="cannot be reached"):
        plan_of(network, everything, choices, flops=least - 0.002)


def test_a_head_share_that_leaves_nothing_for_the_ranks_is_named(network, everything):
    with pytest.raises(InputError, match=r"criterion\.head_share 1 and the smallest ranks") as refused:
        plan_of(network, everything, {"head_share": 1.0}, flops=0.3)
    assert "keep fewer heads" in refused.value.mend


def test_eps_is_the_mass_that_was_cut_off_and_inspect_shows_it(network, everything):
    loose, tight = (plan_of(network, everything, flops=f) for f in (0.8, 0.5))
    for tower in ("vision", "language"):
        assert 0 <= loose.budget.eps[tower] <= tight.budget.eps[tower] < 1
    assert any("KS distance" in str(line) and f"{tight.budget.eps['vision']:.4f}" in str(line) for line in plan_tables(tight))
    uniform = plan_of(network, everything, PUBLISHED["michel"])
    assert uniform.budget.eps is None
    assert not any("KS distance" in str(line) for line in plan_tables(uniform))
    assert Plan.from_json(tight.to_json()).budget == tight.budget


def test_a_tower_that_the_data_do_not_reach_is_not_cut():
    network, data = build(), batches(images=False)
    stats = gather_for(Criterion(), network, find_anatomy(network), data)
    with pytest.raises(InputError, match="no calibration sample reaches the vision tower") as refused:
        plan_of(network, stats)
    assert "--scope language" in refused.value.mend
    plan = plan_of(network, stats, scope="language")
    factors = make_factors(network, plan, data, stats)
    assert not any(k.startswith("vision") for k in factors)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_tower_that_the_workload_never_runs_stays_whole(network, everything, allocation):
    anatomy, criterion = find_anatomy(network), Criterion(rank_multiple=2, allocation=allocation)
    plan = decide(
        look_at_all(network, anatomy, everything, criterion),
        anatomy,
        source=Source(id="random", sha256="0" * 64),
        criterion=criterion,
        workload=WORKLOAD.model_copy(update={"images": 0}),
        flops=0.5,
        scope="all",
    )
    assert 0.4 < plan.budget.predicted <= 0.5
    assert {x.tower for x in anatomy.layers() if plan.decision(x.tower, x.index).cuts(x)} == {"language"}
    assert {x.tower for x in layers_to_cut(anatomy, WORKLOAD, "all")} == {"vision", "language"}


def test_a_tower_without_any_gradient_is_not_cut():
    network = build()
    for linear in find_anatomy(network).projector:
        network.get_submodule(linear.path).weight.zero_()  # nothing that the vision tower says reaches the loss
    stats = gather_for(Criterion(), network, find_anatomy(network), batches())
    assert not stats.gradients[site("vision", 0, "o")].outer.any()
    with pytest.raises(InputError, match="no gradient in the vision tower"):
        plan_of(network, stats)
    blind = {"heads": "ks-activation", "weighting": "activation"}
    assert plan_of(network, gather_for(Criterion(**blind), network, find_anatomy(network), batches()), blind).budget.predicted <= 0.5
