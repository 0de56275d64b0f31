"""Recovery on small random networks: what is learned, what stays, and that the factors carry all of it."""

from functools import partial

import numpy as np
import pytest
import torch
from networks import IMAGE_TOKEN, IMAGE_TOKENS, build, inputs

from infoprune_export.compress.packing import make_rows, pack
from infoprune_export.compress.recover import Distillation, answers_right, distance, divergence, recover
from infoprune_export.compress.surgery import apply_plan
from infoprune_export.compress.taps import tap_points
from infoprune_export.compress.training import WHOLE, Share, train
from infoprune_export.errors import InputError
from infoprune_export.models.families import find_anatomy
from infoprune_export.plans import Budget, LayerPlan, Plan, Source
from infoprune_export.recipe import Criterion, Recovery, Workload

PROMPT = np.concatenate([[1], np.full(IMAGE_TOKENS, IMAGE_TOKEN)])
FAST = Recovery(batch=4, rate=3e-3, hidden_every=1)


def make_plan(model, tower=None) -> Plan:
    """Heads gone and feed-forwards cut in the first two layers (of one tower)."""
    anatomy = find_anatomy(model)
    layers = []
    for x in anatomy.layers():
        cut = x.index < 2 and tower in (None, x.tower)
        a = x.attention
        groups = list(range(a.kv_groups))[: 2 if cut else None]
        heads = list(range(len(groups) * a.heads_per_group))
        ranks = {role: 8 if cut and role != "gate" else None for role in x.ffn.matrices}
        layers.append(LayerPlan(tower=x.tower, layer=x.index, kv_groups=groups, heads=heads, ranks=ranks))
    budget = Budget(scope="all", requested=0.5, predicted=0.5, original_flops=2, compressed_flops=1)
    source = Source(id="random", sha256="0" * 64)
    return Plan(source=source, criterion=Criterion(), workload=Workload(), budget=budget, layers=layers, anatomy=anatomy)


def random_factors(plan):
    rng = np.random.default_rng(0)
    factors = {}
    for key, rank in plan.low_rank_sites().items():
        linear = plan.trained_maps()[key]
        for name, shape in (("first", (rank, linear.d_in)), ("second", (linear.d_out, rank))):
            factors[f"{key}.{name}"] = (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
        if linear.bias:
            factors[f"{key}.bias"] = np.zeros(linear.d_out, np.float32)
    return factors


def make_rows_of(n=12):
    rng = np.random.default_rng(0)
    images = []
    for i in range(n):
        pixels = rng.standard_normal((1, 3, 16, 16)).astype(np.float32)
        asked = [(np.concatenate([PROMPT, [5, 6 + k]]), np.array([20 + (i + k) % 5, 2])) for k in range(1 + i % 3)]
        images.append((lambda p=pixels: p, asked))
    return make_rows(images, image_token=IMAGE_TOKEN)


@pytest.fixture
def networks():
    """Teacher, student (both compressed by the same plan and factors) and their plan."""
    teacher, student = build(), build()
    plan = make_plan(student)
    plan.factors = random_factors(plan)
    apply_plan(student, plan, plan.factors)
    return teacher, student, plan


def loss_of(student, teacher, plan, rows, settings=FAST):
    objective = Distillation(student, teacher, plan, rows, settings.model_copy(update={"batch": len(rows)}))
    value = objective.loss(0, WHOLE)[0].item()
    objective.close()
    return value


@pytest.mark.parametrize("method", ["full", "lora"])
def test_it_learns_and_its_factors_carry_what_it_learned(networks, method, tmp_path):
    teacher, student, plan = networks
    rows = make_rows_of()
    settings = FAST.model_copy(update={"method": method, "lora_rank": 4})
    before = loss_of(student, teacher, plan, rows)
    frozen = {n: p.clone() for n, p in student.named_parameters() if "norm" in n or "embed" in n}
    trained = recover(student, teacher, plan, rows, settings, steps=40, data=["tiny:vqa"])
    assert loss_of(student, teacher, plan, rows) < 0.7 * before
    for name, p in student.named_parameters():
        assert not p.requires_grad
        assert "lora" not in name
        if name in frozen:
            assert torch.equal(p, frozen[name]), name

    assert trained.training.model_dump(exclude_defaults=True) == {
        "steps": 40,
        "rate": FAST.rate,
        "data": ["tiny:vqa"],
        "images": 12,
        "questions": 24,
    }
    assert "training" not in plan.model_dump(exclude_none=True)
    trained.save(tmp_path)
    rebuilt, again = build(), Plan.load(tmp_path)
    apply_plan(rebuilt, again, again.factors)
    x = inputs()
    assert torch.equal(rebuilt(**x).logits, student(**x).logits)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_without_a_rate_one_is_found_that_learns(networks, method):
    teacher, student, plan = networks
    rows = make_rows_of()
    before = loss_of(student, teacher, plan, rows)
    settings = FAST.model_copy(update={"method": method, "lora_rank": 4, "rate": None})
    found = recover(student, teacher, plan, rows, settings, steps=30).training.rate
    assert 1e-6 < found < 5e-2
    assert loss_of(student, teacher, plan, rows) < 0.9 * before


def test_training_that_only_harms_ends_with_patience_and_leaves_the_network_as_it_was(networks):
    teacher, student, plan = networks
    before = {n: p.clone() for n, p in student.named_parameters()}
    pixels, prompt = np.random.default_rng(1).standard_normal((1, 3, 16, 16)).astype(np.float32), np.concatenate([PROMPT, [5, 6]])
    says = student(input_ids=torch.tensor(prompt)[None], pixel_values=torch.tensor(pixels)).logits[0, -1].argmax().item()
    validation = make_rows([(lambda: pixels, [(prompt, np.array([says]))])], image_token=IMAGE_TOKEN)
    settings = FAST.model_copy(update={"rate": 1.0, "patience": 2})
    record = recover(student, teacher, plan, make_rows_of(), settings, steps=40, validation=validation).training
    assert (record.steps, record.kept) == (8, 0)  # looked before the first step, after 4 and after 8
    assert all(torch.equal(p, before[n]) for n, p in student.named_parameters())


def test_only_the_tower_that_was_cut_and_the_projector_are_trained():
    teacher, student = build(), build()
    plan = make_plan(student, "language")
    apply_plan(student, plan, random_factors(plan))
    objective = Distillation(student, teacher, plan, make_rows_of(), FAST)
    assert {n.split(".")[1] for n in objective.trained} == {"language_model", "multi_modal_projector"}


def test_what_the_original_said_is_remembered_and_changes_nothing(networks):
    teacher, student, plan = networks
    rows = make_rows_of()
    remembering, forgetting = (Distillation(student, teacher, plan, rows, FAST, memory=m) for m in (10**9, 0))
    calls = []
    teacher.model.register_forward_hook(lambda *a: calls.append(1))
    for step in range(3):  # one epoch
        remembering.loss(step, WHOLE)
    assert len(remembering.lessons.kept) == len(rows)
    assert not forgetting.lessons.kept
    asked = len(calls)
    losses = [(remembering.loss(step, WHOLE)[0], forgetting.loss(step, WHOLE)[0]) for step in range(3, 6)]
    assert len(calls) == asked + len(rows)
    assert all(torch.equal(one, other) for one, other in losses)


def test_rows_without_answers_or_images_learn_from_the_original_alone(networks):
    teacher, student, plan = networks
    prompt, nobody = np.concatenate([PROMPT, [5, 6, 7]]), np.empty(0, np.int64)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    rows = make_rows([(lambda: pixels, [(prompt, nobody)]), (None, [(np.array([1, 5, 6, 7]), nobody)])], image_token=IMAGE_TOKEN)
    objective = Distillation(student, teacher, plan, rows, FAST)
    loss, figures = objective.loss(0, WHOLE)
    assert figures["ce"] == 0 < figures["kl"]
    assert figures["hidden"] > 0
    gradients = torch.autograd.grad(loss, list(objective.trained.values()), allow_unused=True)
    assert all(torch.isfinite(g).all() for g in gradients if g is not None)


def test_every_row_comes_once_an_epoch_and_shares_divide_a_batch(networks):
    teacher, student, plan = networks
    objective = Distillation(student, teacher, plan, make_rows_of(14), FAST, seed=3)
    epochs = [[objective.batch(3 * e + i) for i in range(3)] for e in range(2)]
    for epoch in epochs:
        seen = [i for batch in epoch for i in batch]
        assert len(set(seen)) == len(seen) == 12
    assert epochs[0] != epochs[1]
    parts = [objective.loss(0, Share(i, 2))[0] for i in range(2)]
    assert all(torch.isfinite(p) for p in parts)


def test_an_interrupted_recovery_goes_on_to_the_same_weights(networks, tmp_path, monkeypatch):
    teacher, student, plan = networks
    whole = recover(student, teacher, plan, make_rows_of(), FAST, steps=8)

    class Killed(Exception):
        pass

    def dies(self, step, share, loss=Distillation.loss):
        if step == 5:
            raise Killed
        return loss(self, step, share)

    monkeypatch.setattr("infoprune_export.compress.recover.train", partial(train, checkpoint_seconds=0))
    for attempt in range(2):
        resumed = build()
        apply_plan(resumed, plan, plan.factors)
        with monkeypatch.context() as patch:
            if attempt == 0:
                patch.setattr(Distillation, "loss", dies)
                with pytest.raises(Killed):
                    recover(resumed, teacher, plan, make_rows_of(), FAST, steps=8, directory=tmp_path)
            else:
                again = recover(resumed, teacher, plan, make_rows_of(), FAST, steps=8, directory=tmp_path)
    assert again.factors_sha256 == whole.factors_sha256


def test_answers_are_right_exactly_where_greedy_decoding_gives_them():
    model = build()
    anatomy, rows = find_anatomy(model), []
    expected = []
    for seed in range(3):
        pixels = np.random.default_rng(seed).standard_normal((1, 3, 16, 16)).astype(np.float32)
        prompt = np.concatenate([PROMPT, [5, 6 + seed]])
        ids = torch.from_numpy(prompt)[None]
        x = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.from_numpy(pixels)}
        said = model.generate(**x, max_new_tokens=2, do_sample=False, eos_token_id=None)[0, len(prompt) :].numpy()
        wrong = np.array([said[0], (said[1] + 1) % 90])
        rows += make_rows([(lambda p=pixels: p, [(prompt, said), (prompt, wrong)])], image_token=IMAGE_TOKEN)
        expected.append([True, False])
    assert answers_right(model, anatomy, rows) == expected


def test_closed_forms_of_the_losses():
    taught = torch.tensor([[0.0, 0.0]])
    assert divergence(taught, taught, 2.0) == 0
    # KL((1/2, 1/2) || (p, 1 - p)) with logits (2, 0) at T = 2: p = sigmoid(1).
    p = torch.sigmoid(torch.tensor(1.0))
    expected = 4 * (0.5 * torch.log(0.5 / p) + 0.5 * torch.log(0.5 / (1 - p)))
    torch.testing.assert_close(divergence(torch.tensor([[2.0, 0.0]]), taught, 2.0), expected)
    hidden = torch.ones(2, 3, 4)
    assert distance(hidden, [torch.ones(3, 4), torch.ones(3, 4)], None) == 0
    assert distance(2 * hidden, [torch.ones(3, 4), torch.ones(2, 4)], torch.tensor([[True] * 3, [True, True, False]])) == 1


def test_hidden_states_are_compared_at_both_towers_and_the_projector():
    anatomy = find_anatomy(build())
    assert [x.rpartition(".")[2] for x in tap_points(anatomy, 2)] == ["1", "1", "2", "linear_2"]
    assert tap_points(anatomy, 0) == []


def test_without_rows_there_is_nothing_to_train_on(networks):
    teacher, student, plan = networks
    with pytest.raises(InputError, match="no training data"):
        recover(student, teacher, plan, [], FAST, steps=1)
    assert pack(make_rows_of(1)).targets.shape[0] == 1
