"""Prices of plans by a table of times, in closed form, and when a table is not to be used."""

import pytest
from networks import build
from tables import NANOSECONDS, conditions, linear_table

from infoprune_export.models.families import find_anatomy
from infoprune_export.models.flops import count
from infoprune_export.plans import Budget, LayerPlan, Plan, Source
from infoprune_export.recipe import Criterion, Workload
from infoprune_export.timetable import Savings, TimeTable, matrix_key, shapes_of

WORKLOAD = Workload(image_tokens=16, text_tokens=5, new_tokens=3)


@pytest.fixture(scope="module")
def anatomy():
    return find_anatomy(build())


def _plan(anatomy, groups, rank):
    layers = [
        LayerPlan(
            tower=x.tower,
            layer=x.index,
            kv_groups=list(range(groups)),
            heads=list(range(groups * x.attention.heads_per_group)),
            ranks=dict.fromkeys(x.ffn.matrices, rank),
        )
        for x in anatomy.layers()
    ]
    budget = Budget(scope="all", requested=1, predicted=1, original_flops=1, compressed_flops=1)
    source = Source(id="x", sha256="0" * 64)
    return Plan(source=source, criterion=Criterion(), workload=WORKLOAD, budget=budget, layers=layers, anatomy=anatomy)


def test_savings_are_straight_between_sizes_and_never_more_for_more():
    saved = Savings(sizes=[8, 16, 24, 32], nanoseconds=[100, 50, 70, -20])
    assert [saved(x) for x in (1, 8, 12, 16, 20, 24, 28, 32, 99)] == [100, 100, 80, 60, 60, 60, 20, -20, -20]


def test_contradictions_are_shared_among_all_who_take_part():
    saved = Savings(sizes=[1, 2, 3, 4], nanoseconds=[9, 1, 2, 6])
    assert [saved(x) for x in (1, 2, 3, 4)] == [9, 3, 3, 3]
    assert saved.nanoseconds == [9, 1, 2, 6]  # a table keeps what was measured


@pytest.mark.parametrize(("groups", "rank"), [(1, 4), (2, 7), (3, None)])
def test_where_time_is_flops_a_plan_keeps_of_both_the_same(anatomy, groups, rank):
    table, plan = linear_table(anatomy, WORKLOAD), _plan(anatomy, groups, rank)
    assert table.end_to_end == pytest.approx(NANOSECONDS * count(anatomy, WORKLOAD).total)
    assert table.kept(plan) == pytest.approx(count(anatomy, WORKLOAD, plan).total / count(anatomy, WORKLOAD).total)


def test_the_original_keeps_everything(anatomy):
    table = linear_table(anatomy, WORKLOAD)
    for layer in anatomy.layers():
        assert table.saved_by_heads(layer, layer.attention.kv_groups) == 0
        assert all(table.saved_by_pair(m, layer.tower, None) == 0 for m in layer.ffn.matrices.values())


def test_a_table_reads_back_as_it_was_written(anatomy):
    table = linear_table(anatomy, WORKLOAD)
    assert TimeTable.model_validate_json(table.model_dump_json()) == table


def test_conditions_that_differ_are_named(anatomy):
    then = conditions(anatomy, WORKLOAD, versions={"onnxruntime": "1.0"})
    now = conditions(anatomy, WORKLOAD, versions={"onnxruntime": "2.0"}, threads=4)
    assert then.differences(then) == []
    assert then.differences(now) == ["threads: 1, now 4", "versions onnxruntime: 1.0, now 2.0"]


def test_shapes_name_sizes_and_not_places(anatomy):
    assert shapes_of(anatomy) == shapes_of(find_anatomy(build(seed=1)))
    assert shapes_of(anatomy) != shapes_of(find_anatomy(build(language="gemma")))
    assert matrix_key(anatomy.vision.layers[0].ffn.up) == "32x64+b"
