"""A budget of time: one code path with FLOPs, and whatever a table says is followed."""

import pytest
from networks import batches, build
from tables import linear_table

from infoprune_export.compress.decide import decide
from infoprune_export.compress.evidence import gather_for
from infoprune_export.compress.findings import look_at_all
from infoprune_export.errors import InputError
from infoprune_export.models.families import find_anatomy
from infoprune_export.plans import Plan, Source
from infoprune_export.recipe import Criterion, Workload

WORKLOAD = Workload(image_tokens=16, text_tokens=5, new_tokens=3)


@pytest.fixture(scope="module")
def network():
    return build()


@pytest.fixture(scope="module")
def anatomy(network):
    return find_anatomy(network)


@pytest.fixture(scope="module")
def decided(network, anatomy):
    stats = gather_for(Criterion(), network, anatomy, batches())

    def make(choices=None, scope="all", **budget) -> Plan:
        criterion = Criterion(**{"rank_multiple": 2, **(choices or {})})
        source = Source(id="random", sha256="0" * 64)
        found = look_at_all(network, anatomy, stats, criterion)
        return decide(found, anatomy, source=source, criterion=criterion, workload=WORKLOAD, scope=scope, **budget)

    return make


@pytest.mark.parametrize("kept", [0.8, 0.6, 0.45])
@pytest.mark.parametrize(
    "choices",
    [{}, {"head_share": 0.6}, {"floors": {"vision": {"heads": 0.5, "ranks": 0.4}}}, {"floors": {"vision": {"total": 0.7}}}],
)
def test_where_time_is_flops_the_allocation_is_that_of_flops(decided, anatomy, choices, kept):
    by_time = decided(choices, latency=kept, table=linear_table(anatomy, WORKLOAD))
    by_flops = decided(choices, flops=kept)
    assert by_time.layers == by_flops.layers
    assert by_time.budget.predicted == by_flops.budget.predicted
    assert by_time.budget.latency.predicted == pytest.approx(by_flops.budget.predicted)
    assert (by_time.budget.latency.requested, by_flops.budget.latency) == (kept, None)


def test_where_pairs_never_pay_everything_is_dense_and_heads_go(decided, anatomy):
    plan = decided(latency=0.85, table=linear_table(anatomy, WORKLOAD, pairs=-0.1))
    assert plan.low_rank_sites() == {}
    assert any(len(plan.decision(x.tower, x.index).kv_groups) < x.attention.kv_groups for x in anatomy.layers())
    assert 0.8 < plan.budget.latency.predicted <= 0.85


def test_a_rank_that_is_slower_than_dense_is_never_chosen(decided, anatomy):
    table = linear_table(anatomy, WORKLOAD)
    for part in table.parts.values():
        for savings in part.pairs.values():
            most = savings.nanoseconds[0]
            savings.sizes, savings.nanoseconds = [1, 10, 11, 64], [most, most / 2, -1.0, -1.0]
    for kept in (0.9, 0.7, 0.6):
        ranks = decided(latency=kept, table=table).low_rank_sites().values()
        assert ranks and max(ranks) <= 10


def test_a_scope_says_what_may_be_cut_and_not_what_the_fraction_is_of(decided, anatomy):
    plan = decided(scope="language", latency=0.7, table=linear_table(anatomy, WORKLOAD))
    assert 0.65 < plan.budget.latency.predicted <= 0.7
    assert not any(plan.decision("vision", x.index).cuts(x) for x in anatomy.vision.layers)


def test_out_of_reach_names_the_least_time(decided, anatomy):
    table = linear_table(anatomy, WORKLOAD)
    with pytest.raises(InputError, match="cannot be reached") as refused:
        decided(latency=0.05, table=table)
    least = float(refused.value.mend.split("--latency ")[1].split()[0])
    assert decided(latency=least, table=table).budget.latency.predicted <= least
