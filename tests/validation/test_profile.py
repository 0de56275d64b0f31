"""The table that is measured, held against machines whose times are known."""

import json

import pytest
from tables import conditions, linear_table

from infoprune_export.engines.stacks import Block
from infoprune_export.errors import InputError, NotEnough
from infoprune_export.memory import Memory
from infoprune_export.models.flops import Passes, attention_flops, ffn_flops, passes
from infoprune_export.recipe import Workload
from infoprune_export.timetable import attention_key, matrix_key
from infoprune_export.validation import latency_budget, profile, stand_ins, table_cache
from infoprune_export.validation.latency_budget import meet_latency
from infoprune_export.validation.profile import measure_table
from infoprune_export.validation.stand_ins import Setting, StandIns

WORKLOAD = Workload(image_tokens=4, text_tokens=6, new_tokens=5)
FIXED = 5000.0
"""What every pass takes beside its layers."""


@pytest.fixture
def setting(anatomy):
    return Setting(anatomy, WORKLOAD, threads=1)


@pytest.fixture
def flops_as_time(monkeypatch, anatomy):
    """A machine that takes a nanosecond for a FLOP of a layer, and gets slower all the time."""
    over, slower = passes(anatomy, WORKLOAD), iter(range(10**6))

    def each(part):
        n = WORKLOAD.new_tokens - 1 if part == "decode" else 1
        return Passes(over[part].tokens / n, over[part].pairs / n)

    def takes(block: Block, part: str) -> float:
        a = block.layer.attention
        attention = attention_flops(block.layer, block.groups * a.heads_per_group, block.groups, each(part))
        return attention + ffn_flops(block.layer, block.ranks, each(part))

    def opened(self, change=stand_ins.stacks.whole, layers=None):
        vision, language = ([change(x) for x in tower] for tower in (layers or self.sample))
        return {p: FIXED + sum(takes(b, p) for b in (vision if p == "vision" else language)) for p in self.setting.passes}

    def in_turn(networks, seconds):
        weather = 1.0 if "some" in networks else 1 + next(slower)
        return {name: {part: weather * ns for part, ns in parts.items()} for name, parts in networks.items()}

    monkeypatch.setattr(StandIns, "open", opened)
    for module in (profile, stand_ins):
        monkeypatch.setattr(module, "times_in_turn", in_turn)
    return takes


@pytest.mark.parametrize("sample_weights", [10**9, 0])
@pytest.mark.parametrize("most_layers", [99, 2])
def test_what_is_saved_is_found_whatever_the_machine_does_meanwhile(
    flops_as_time, setting, anatomy, monkeypatch, most_layers, sample_weights
):
    monkeypatch.setattr(stand_ins, "MOST_LAYERS", most_layers)
    monkeypatch.setattr(stand_ins, "SAMPLE_WEIGHTS", sample_weights)
    told = []
    table = measure_table(setting, progress=lambda what, done, total: told.append((done, total)))
    assert told[0][0] == 0 and told[-1][0] == told[-1][1]
    for layer in anatomy.layers():
        for name in ("vision",) if layer.tower == "vision" else ("prefill", "decode"):
            part, whole, a = table.parts[name], stand_ins.stacks.whole(layer), layer.attention
            saved = flops_as_time(whole, name) - flops_as_time(Block(layer, 1, whole.ranks), name)
            assert part.attention[attention_key(layer)](1) == pytest.approx(saved)
            assert part.attention[attention_key(layer)](a.kv_groups) == 0
            for m in layer.ffn.matrices.values():
                savings = part.pairs[matrix_key(m)]
                n = passes(anatomy, WORKLOAD)[name].tokens / part.passes
                for rank, ns in zip(savings.sizes, savings.nanoseconds, strict=True):
                    assert ns == pytest.approx(2 * n * (m.d_in * m.d_out - rank * (m.d_in + m.d_out)))
    for name, part in table.parts.items():
        layers = anatomy.tower("vision" if name == "vision" else "language").layers
        assert part.whole == pytest.approx(FIXED + sum(flops_as_time(stand_ins.stacks.whole(x), name) for x in layers))
    assert (table.parts["vision"].passes, table.parts["decode"].passes) == (1, WORKLOAD.new_tokens - 1)


def test_a_real_machine_gives_a_time_for_everything(setting):
    table = measure_table(setting, seconds=0)
    assert list(table.parts) == ["vision", "prefill", "decode"]
    assert all(part.whole > 0 for part in table.parts.values())
    assert table.conditions == setting.conditions()


def test_parts_that_the_workload_lacks_are_not_measured(anatomy):
    text = Workload(images=0, image_tokens=4, text_tokens=6, new_tokens=1)
    table = measure_table(Setting(anatomy, text, threads=1), seconds=0)
    assert list(table.parts) == ["prefill"]
    layer = anatomy.vision.layers[0]
    assert table.saved_by_heads(layer, 1) == table.saved_by_pair(layer.ffn.up, "vision", 2) == 0


class _Table:
    """A table by which a plan keeps what it was decided for."""

    def kept(self, plan):
        return plan.asked


class _Plan:
    def __init__(self, asked):
        from types import SimpleNamespace

        from infoprune_export.plans import LatencyBudget

        self.asked, self.budget = asked, SimpleNamespace(latency=LatencyBudget(requested=asked, predicted=asked, original_ms=1))


@pytest.mark.parametrize(("arrives", "attempts"), [(1.0, 1), (1.25, 2), (0.8, 2)])
def test_a_request_is_met_end_to_end(monkeypatch, arrives, attempts):
    monkeypatch.setattr(latency_budget, "share_that_arrives", lambda *_: arrives)
    asked = []
    plan = meet_latency(None, _Table(), 0.5, lambda kept: asked.append(kept) or _Plan(kept))
    assert len(asked) == attempts
    assert asked[-1] == pytest.approx(1 - 0.5 / arrives)
    assert (plan.budget.latency.requested, plan.budget.latency.predicted) == (0.5, pytest.approx(0.5))


@pytest.mark.parametrize(("arrives", "requested", "times"), [(1.0, 0.5, 0), (0.5, 0.6, 1), (0.3, 0.5, 0)])
def test_it_says_that_it_decides_again_where_it_does(monkeypatch, arrives, requested, times):
    """Not where the table would have to keep less than nothing."""
    monkeypatch.setattr(latency_budget, "share_that_arrives", lambda *_: arrives)
    asked, said = [], []
    meet_latency(None, _Table(), requested, lambda kept: asked.append(kept) or _Plan(kept), notify=said.append)
    assert len(said) == len(asked) - 1 == times


def test_the_nearest_plan_is_taken_where_the_table_goes_no_further(monkeypatch):
    monkeypatch.setattr(latency_budget, "share_that_arrives", lambda *_: 0.8)

    def decide(kept):
        if kept < 0.5:
            raise InputError("cannot be reached")
        return _Plan(kept)

    assert meet_latency(None, _Table(), 0.5, decide).budget.latency.predicted == pytest.approx(0.6)
    with pytest.raises(InputError):
        meet_latency(None, _Table(), 0.4, decide)


@pytest.fixture
def kept_table(monkeypatch, tmp_path, setting, anatomy):
    """A cache of its own; measuring is counted and gives a made-up table."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = []

    def measure(setting, seconds, progress):
        measured.append(setting)
        return linear_table(anatomy, WORKLOAD).model_copy(update={"conditions": setting.conditions()})

    monkeypatch.setattr(table_cache, "measure_table", measure)
    return measured


def test_a_table_is_measured_once(kept_table, setting, tmp_path):
    said = []
    first = table_cache.table_for(setting, notify=said.append)
    assert table_cache.table_for(setting, notify=said.append) == first
    assert (len(kept_table), said) == (1, [])
    assert [p.parent for p in tmp_path.rglob("*.json")] == [tmp_path / "infoprune-export" / "latency"]


@pytest.mark.parametrize("change", [{"threads": 2}, {"dtype": "fp16"}, {"workload": WORKLOAD.model_copy(update={"new_tokens": 9})}])
def test_another_setting_has_a_table_of_its_own(kept_table, setting, change):
    from dataclasses import replace

    table_cache.table_for(setting)
    table_cache.table_for(replace(setting, **change))
    table_cache.table_for(setting)
    assert len(kept_table) == 2


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"versions": {"onnxruntime": "1.0"}}, "is stale (versions onnxruntime: 1.0, now"),
        ({"machine": {"cpu": "abacus"}}, "is stale (machine cpu: abacus, now"),
        ({"schema_version": "old"}, "no latency table that this version reads"),
    ],
)
def test_a_stale_or_foreign_table_is_told_about_and_measured_again(kept_table, setting, tmp_path, damage, words):
    table = table_cache.table_for(setting)
    (path,) = tmp_path.rglob("*.json")
    written = json.loads(path.read_text())
    for name, value in damage.items():
        kept = written["conditions"][name]
        written["conditions"][name] = {**kept, **value} if isinstance(kept, dict) else value
    path.write_text(json.dumps(written))
    said = []
    assert table_cache.table_for(setting, notify=said.append) == table
    assert len(kept_table) == 2
    assert len(said) == 1 and words in said[0] and "measuring again" in said[0]


def test_a_cache_that_cannot_be_written_costs_time_only(kept_table, setting, tmp_path):
    (tmp_path / "infoprune-export").write_text("in the way")
    assert table_cache.table_for(setting).conditions == setting.conditions()


def test_a_machine_too_small_for_a_layer_is_told_before_anything_is_made(setting, monkeypatch):
    monkeypatch.setattr(stand_ins, "memory", lambda: Memory(total=10_000, available=10_000))
    with pytest.raises(NotEnough, match="GB of memory"):
        StandIns(setting)


def test_conditions_of_a_table_name_no_host(setting):
    import socket

    assert conditions(setting.anatomy, WORKLOAD) != setting.conditions()
    assert socket.gethostname() not in setting.conditions().model_dump_json()
