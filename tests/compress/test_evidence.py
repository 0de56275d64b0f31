"""Gradients of the reference answers, against autograd sample by sample and against finite differences."""

import tempfile

import numpy as np
import pytest
import torch
from networks import build, inputs

from infoprune_export.compress import evidence
from infoprune_export.compress.calibration import Sample, make_batches
from infoprune_export.compress.evidence import gather_for, gather_task, passes, task_loss
from infoprune_export.compress.moments import InputScale, Moments
from infoprune_export.compress.statistics import Batch
from infoprune_export.errors import InputError
from infoprune_export.models.anatomy import site
from infoprune_export.models.families import find_anatomy
from infoprune_export.recipe import Criterion


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def data():
    x = inputs(batch=4)
    pixels = x["pixel_values"].numpy()
    answers = [(5, 2), (7, 2), (5, 2), (9, 8)]
    return make_batches([Sample(ids.numpy(), np.array(answers[i]), pixels[i : i + 1]) for i, ids in enumerate(x["input_ids"])])


def _alone(batches):
    for b in batches:
        for i in range(b.samples):
            yield Batch({k: v[i : i + 1] for k, v in b.inputs.items()}, b.targets[i : i + 1])


def _loss(model, batch):
    return task_loss(model(**batch.inputs, use_cache=False).logits, batch.targets)


@pytest.mark.parametrize("tower", ["vision", "language"])
def test_a_gate_is_how_far_every_sample_moves_the_loss(model, data, tower):
    """Central differences of the loss as one unit of one layer is turned up and down."""
    anatomy = find_anatomy(model)
    layer = anatomy.tower(tower).layers[1]
    a, unit, step = layer.attention, 1, 1e-2
    found = gather_task(model, anatomy, data, gates=True).gates[site(tower, 1, "o")]
    width = a.heads_per_group * a.head_dim
    weight = model.get_submodule(a.o.path).weight
    whole, expected = weight.clone(), 0.0
    for batch in _alone(data):
        losses = []
        for sign in (1, -1):
            weight[:, unit * width : (unit + 1) * width] = whole[:, unit * width : (unit + 1) * width] * (1 + sign * step)
            losses.append(_loss(model, batch).item())
        expected += abs(losses[0] - losses[1]) / (2 * step)
    weight.copy_(whole)
    assert found[unit].item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("role", ["q", "k", "v", "o"])
def test_weight_gradients_are_those_of_the_whole_set_at_once(model, data, role):
    anatomy = find_anatomy(model)
    path = anatomy.language.layers[0].linear(role).path
    found = gather_task(model, anatomy, data, weights=True).weights[site("language", 0, role)]
    weight = model.get_submodule(path).weight.requires_grad_()
    sum(_loss(model, b) for b in data).backward()
    expected, weight.grad = weight.grad, None
    weight.requires_grad_(False)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_gathering_leaves_the_model_as_it_was(model, data):
    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]

    before = hooks()
    gather_task(model, find_anatomy(model), data, gates=True, weights=True)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert hooks() == before


def test_only_what_is_asked_for_is_gathered(model, data):
    anatomy = find_anatomy(model)
    forward = gather_for(Criterion(heads="flap", weighting="activation"), model, anatomy, data)
    assert (forward.gradients, forward.scales, forward.task) == ({}, {}, None)
    gates = gather_for(Criterion(heads="michel", weighting="asvd", allocation="d-rank"), model, anatomy, data).task
    assert gates.gates
    assert not gates.weights
    assert gather_for(Criterion(heads="taylor", weighting="none", allocation="d-rank"), model, anatomy, data).task.weights
    assert passes(Criterion()) == 1
    assert passes(Criterion(heads="michel")) == 2


def test_samples_in_one_batch_count_like_samples_on_their_own(model, data):
    anatomy = find_anatomy(model)
    together, apart = (gather_task(model, anatomy, d, gates=True, weights=True) for d in (data, list(_alone(data))))
    for kind in ("gates", "weights"):
        for key, value in getattr(together, kind).items():
            torch.testing.assert_close(value, getattr(apart, kind)[key], rtol=1e-3, atol=1e-5)


def test_what_is_kept_does_not_grow_with_the_samples(model, data):
    anatomy = find_anatomy(model)
    sizes = []
    for batches in (data[:1], data * 3):
        found = gather_task(model, anatomy, batches, gates=True, weights=True)
        sizes.append({k: v.shape for kind in (found.gates, found.weights) for k, v in kind.items()})
    assert sizes[0] == sizes[1]


def test_answers_without_any_gradient_are_refused(data):
    certain = build()
    certain.get_submodule("lm_head").weight.zero_()  # every answer is as likely as any other, whatever came before
    with pytest.raises(InputError, match="loss of the reference answers has no gradient"):
        gather_task(certain, find_anatomy(certain), data, gates=True)


def test_gradients_that_are_not_finite_are_refused(data):
    broken = build()
    broken.get_submodule("model.language_model.layers.1.mlp.up_proj").weight[0, 0] = float("inf")
    with pytest.raises(InputError, match="not finite at"):
        gather_task(broken, find_anatomy(broken), data, gates=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_safely(dtype):
    """Sums past 65504 and small numbers added to large ones: what half precision itself would lose."""
    rows = torch.full((5000, 3), 64.0, dtype=dtype)
    rows[:, 1] = 2.0**-8
    moments, scale = Moments.zeros(3), InputScale.zeros(3)
    for part in rows.split(100):
        moments.add(part)
        scale.add(part)
    torch.testing.assert_close(moments.second.diagonal(), torch.tensor([4096.0, 2.0**-16, 4096.0], dtype=torch.float64))
    torch.testing.assert_close(scale.mean, torch.tensor([64.0, 2.0**-8, 64.0], dtype=torch.float64))


@pytest.mark.parametrize("at", [0, 2, 3, 4])
def test_a_killed_pass_is_gone_on_from_where_it_was(model, data, tmp_path, monkeypatch, at):
    anatomy, passed = find_anatomy(model), []
    gathered = lambda **given: gather_task(model, anatomy, data, gates=True, weights=True, **given)
    expected = gathered()
    monkeypatch.setattr(tempfile, "TemporaryDirectory", None)

    def dies(layer):
        if len(passed) == at:
            raise KeyboardInterrupt
        passed.append(layer)

    with pytest.raises(KeyboardInterrupt):
        gathered(directory=tmp_path, progress=dies)
    assert (tmp_path / "states").is_dir(), "not in the system's temporary directory"
    found = gathered(directory=tmp_path)
    assert not (tmp_path / "states").exists()
    monkeypatch.setattr(evidence, "Walk", None)
    told = []
    for again in (found, gathered(directory=tmp_path, progress=told.append)):
        for kind in ("gates", "weights"):
            wanted, got = getattr(expected, kind), getattr(again, kind)
            assert wanted.keys() == got.keys() and all(torch.equal(got[k], wanted[k]) for k in wanted)
    assert len(told) == len(list(anatomy.layers()))
