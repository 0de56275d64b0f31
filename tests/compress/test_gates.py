"""The search for heads on networks and toy losses whose answer is known."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import IMAGE_TOKEN, IMAGE_TOKENS, build, inputs

from infoprune_export.compress.allocate import UnitChoice
from infoprune_export.compress.concrete import Gates, open_probability
from infoprune_export.compress.decide import decide, keep_everything
from infoprune_export.compress.findings import look_at_all
from infoprune_export.compress.gates import HeadSearch, initial_log_a, learn_heads, learn_heads_of, planned_share
from infoprune_export.compress.packing import make_rows, pack
from infoprune_export.compress.statistics import Batch, gather
from infoprune_export.compress.surgery import head_rows
from infoprune_export.compress.training import WHOLE, Share, train
from infoprune_export.errors import InputError
from infoprune_export.models.families import find_anatomy
from infoprune_export.models.flops import attention_flops, count, tower_passes
from infoprune_export.plans import Source
from infoprune_export.progress import Silent
from infoprune_export.recipe import Criterion, Workload

WORKLOAD = Workload(image_tokens=IMAGE_TOKENS, text_tokens=5, new_tokens=3)
HEAD = "lm_head"


def rows_of(n=6, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda k: rng.integers(3, 90, k)
    prompt = lambda: np.concatenate([np.full(IMAGE_TOKENS, IMAGE_TOKEN), draw(4)])
    pixels = rng.standard_normal((n, 1, 3, 16, 16)).astype(np.float32)
    return make_rows([(lambda i=i: pixels[i], [(prompt(), draw(2)) for _ in range(3)]) for i in range(n)], image_token=IMAGE_TOKEN)


def own_answers(model, n=6, seed=0):
    """Questions with the answer, of all words, that the model likes best."""
    x = inputs(batch=n, seed=seed)
    best = model(**x, use_cache=False).logits[:, -1, :90].argmax(-1)
    pixels = x["pixel_values"].numpy()
    asked = [(lambda i=i: pixels[i : i + 1], [(x["input_ids"][i].numpy(), best[i : i + 1].numpy())]) for i in range(n)]
    return make_rows(asked, image_token=IMAGE_TOKEN)


def units_of(anatomy, value=lambda layer, group: 1.0):
    towers = tower_passes(anatomy, WORKLOAD)
    return [
        UnitChoice((x.tower, x.index), g, value(x, g), attention_flops(x, x.attention.heads_per_group, 1, towers[x.tower]))
        for x in anatomy.layers()
        for g in range(x.attention.kv_groups)
    ]


def whole_plan(anatomy):
    source = Source(id="random", sha256="0" * 64)
    return keep_everything(anatomy, source=source, criterion=Criterion(), workload=WORKLOAD, scope="all")


def silence(model, anatomy, dead):
    """Makes some groups of every layer say nothing."""
    for layer in anatomy.layers():
        value = model.get_submodule(layer.attention.v.path)
        rows = head_rows(layer.attention, dead(layer))
        value.weight[rows] = 0
        if value.bias is not None:
            value.bias[rows] = 0


def search_of(model, units, rows=None, cls=HeadSearch, **settings):
    anatomy = find_anatomy(model)
    gates = Gates(model, list(anatomy.layers()))
    return cls(model, anatomy.head_path, gates, units, rows or rows_of(), **{"target": 0.6, "steps": 20, "batch": 2, **settings})


def observed(model):
    batches = [pack(rows_of(seed=seed)) for seed in range(2)]
    return gather(model, find_anatomy(model), [Batch(x.inputs, x.targets) for x in batches])


class Interrupting(Silent):
    """Interrupts training like Ctrl-C after some steps."""

    def __init__(self, after):
        self.left = after

    @contextmanager
    def bar(self, name, total):
        def advance(n, figures=""):
            self.left -= n
            if self.left < 0:
                raise KeyboardInterrupt

        yield advance


class Notes(Silent):
    def __init__(self):
        self.lines = []

    def note(self, line):
        self.lines.append(line)


def test_the_only_informative_head_of_a_layer_survives_where_the_scores_say_nothing():
    model = build()
    anatomy = find_anatomy(model)
    alive = lambda layer: layer.index % layer.attention.kv_groups
    silence(model, anatomy, lambda layer: [g for g in range(layer.attention.kv_groups) if g != alive(layer)])
    units = [replace(u, value=u.cost) for u in units_of(anatomy)]
    found = learn_heads(model, anatomy, own_answers(model), units, target=0.32, steps=30, batch=2, threads=1)
    assert found.heads == {(x.tower, x.index): [alive(x)] for x in anatomy.layers()}
    assert 0 < found.figures["kept"] <= 0.32
    assert found.figures["swapped"] > 0


class Toy(HeadSearch):
    """Every unit is worth a known amount of loss."""

    worth: torch.Tensor

    def loss(self, step, share):
        loss = (self.worth * (1 - open_probability(self.log_a))).sum() + self.price(step)
        return loss, {"loss": loss.item()}


@pytest.mark.parametrize("target", [0.75, 0.4])
@pytest.mark.parametrize("scale", [0.01, 0.3])
def test_the_multipliers_bring_the_expected_flops_to_the_target(target, scale):
    model = build()
    units = units_of(find_anatomy(model))
    toy = search_of(model, units, cls=Toy, target=target, steps=200)
    toy.worth = scale * torch.rand(len(units), generator=torch.Generator().manual_seed(3))
    assert toy.expected_flops().item() == pytest.approx(1 - 0.5 * (1 - target), abs=1e-4)
    train(toy, steps=200, threads=1)
    assert toy.expected_flops().item() == pytest.approx(target, abs=0.03)


def test_expected_flops_of_settled_gates_are_the_counted_ones():
    model = build()
    anatomy, plan = find_anatomy(model), whole_plan(find_anatomy(model))
    units = units_of(anatomy)
    search = search_of(model, units)
    for i, decision in enumerate(plan.layers):
        decision.kv_groups = [0, 2] if i % 2 else [1]
        per_group = 2 if decision.tower == "language" else 1
        decision.heads = [g * per_group + k for g in decision.kv_groups for k in range(per_group)]
    with torch.no_grad():
        search.log_a.copy_(torch.tensor([30.0 if u.group in plan.decision(*u.layer).kv_groups else -30.0 for u in units]))
    total = sum(u.cost for u in units)
    whole, left = count(anatomy, WORKLOAD).total, count(anatomy, WORKLOAD, plan).total
    assert whole - total * (1 - search.expected_flops().item()) == pytest.approx(left, rel=1e-6)
    assert planned_share(plan, units) == pytest.approx(search.expected_flops().item(), rel=1e-6)


def test_gates_begin_in_the_order_of_scores_per_flop():
    units = [UnitChoice(("vision", 0), 0, 3.0, 10), UnitChoice(("vision", 0), 1, 1.0, 10), UnitChoice(("language", 0), 0, 4.0, 20)]
    log_a = initial_log_a(units, 0.5)
    assert log_a[0] > log_a[2] > log_a[1]
    assert open_probability(log_a) @ torch.tensor([0.25, 0.25, 0.5]) == pytest.approx(0.5, abs=1e-5)
    assert initial_log_a([replace(u, value=u.cost) for u in units], 0.3).unique().numel() == 1


def test_the_gradient_of_the_loss_reaches_every_gate():
    model = build()
    search = search_of(model, units_of(find_anatomy(model)), batch=2)
    torch.nn.init.zeros_(search.log_a)
    total = 0
    for step in range(16):
        loss, figures = search.loss(step, WHOLE)
        total = total + torch.autograd.grad(loss - search.price(step), search.log_a)[0].abs()
        assert set(figures) == {"loss", "expected FLOPs"}
    assert (total > 0).all()


def test_every_row_is_used_once_before_any_twice():
    search = search_of(model := build(), units_of(find_anatomy(model)), rows_of(5), batch=2)
    seen = [i for step in range(5) for i in search.batch(step, 2)]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4]


def test_every_share_has_rows_however_many_threads_there_are():
    search = search_of(model := build(), units_of(find_anatomy(model)), rows_of(2), batch=1)
    assert all(torch.isfinite(search.loss(0, Share(i, 5))[0]) for i in range(5))


def test_the_same_seed_gives_the_same_gates_interrupted_or_not(tmp_path):
    def go(progress=None, directory=None, seed=0, threads=1):
        model = build()
        search = search_of(model, units_of(find_anatomy(model)), steps=6, seed=seed)
        train(search, steps=6, name="heads", directory=directory, progress=progress, threads=threads, checkpoint_seconds=0)
        return search.log_a.detach()

    whole = go()
    assert torch.equal(go(), whole)
    assert not torch.equal(go(seed=1), whole)
    assert torch.equal(go(threads=2), go(threads=2))
    with pytest.raises(KeyboardInterrupt):
        go(Interrupting(4), tmp_path)
    assert torch.equal(go(directory=tmp_path), whole)


def test_the_budget_is_met_from_below_and_every_layer_keeps_what_must_stay():
    model = build()
    anatomy = find_anatomy(model)
    units = units_of(anatomy, lambda layer, group: 100.0 - 50 * layer.index - group)
    found = learn_heads(model, anatomy, rows_of(2), units, target=0.5, steps=1, batch=2, stay={("vision", 1): 2}, threads=1)
    assert 0.4 < found.figures["kept"] <= 0.5
    assert all(found.heads[x.tower, x.index] for x in anatomy.layers())
    assert len(found.heads["vision", 1]) >= 2
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_units_of_one_tower_leave_the_other_alone():
    model = build()
    anatomy = find_anatomy(model)
    units = [u for u in units_of(anatomy) if u.layer[0] == "language"]
    found = learn_heads(model, anatomy, rows_of(2), units, target=0.7, steps=1, batch=2, threads=1)
    assert {tower for tower, _ in found.heads} == {"language"}


def test_where_no_heads_have_to_go_nothing_is_learned():
    notes, model = Notes(), build()
    anatomy = find_anatomy(model)
    units = units_of(anatomy)
    found = learn_heads(model, anatomy, [], units, target=planned_share(whole_plan(anatomy), units), steps=50, progress=notes)
    assert notes.lines == ["no heads have to go: nothing for gates to learn"]
    assert all(len(found.heads[x.tower, x.index]) == x.attention.kv_groups for x in anatomy.layers())


def test_no_training_data_is_said():
    model = build()
    with pytest.raises(InputError, match="no training data"):
        learn_heads(model, find_anatomy(model), [], units_of(find_anatomy(model)), target=0.5, steps=5)


@pytest.mark.parametrize("scope", ["all", "language"])
def test_a_plan_s_share_is_kept_and_the_new_plan_meets_the_same_budget(scope):
    model = build()
    anatomy, stats = find_anatomy(model), observed(model)
    common = {"source": Source(id="random", sha256="0" * 64), "workload": WORKLOAD, "flops": 0.55, "scope": scope}
    common["criterion"] = Criterion(rank_multiple=2, head_share=0.6)
    found = look_at_all(model, anatomy, stats, common["criterion"])
    plan = decide(found, anatomy, **common)
    gates = learn_heads_of(plan, model, found, rows_of(2), steps=1, threads=1)
    assert 0.5 < gates.figures["kept"] <= gates.figures["target"] <= 0.6
    learned = decide(found, anatomy, heads=gates.heads, **common)
    for key, groups in gates.heads.items():
        assert learned.decision(*key).kv_groups == groups
    assert 0.53 < learned.budget.predicted <= 0.55
    assert scope == "all" or all(len(d.heads) == 4 for d in learned.layers if d.tower == "vision")
