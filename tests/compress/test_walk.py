"""The walk layer by layer against the model run as a whole."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from networks import LANGUAGE, VISION, build, inputs

from infoprune_export.compress.calibration import Sample, make_batches
from infoprune_export.compress.evidence import task_loss
from infoprune_export.compress.walk import Walk
from infoprune_export.models.families import find_anatomy


def batches(n=4):
    x = inputs(batch=n)
    pixels = x["pixel_values"].numpy()
    text_only = Sample(np.array([1, 7, 8, 9]), np.array([5, 2]), None)
    samples = [Sample(ids.numpy(), np.array([5 + i, 2]), pixels[i : i + 1]) for i, ids in enumerate(x["input_ids"])]
    return make_batches([*samples[:-1], text_only, Sample(samples[-1].prompt_ids, np.array([5, 6, 2]), samples[-1].pixel_values)])


class Seen:
    """What hooks see of every layer: its outputs, and the gradients at its inputs and outputs, in the order of the batches."""

    def __init__(self, model):
        self.model, self.turns = model, []
        self.outputs: dict[str, list] = {}
        self.gradients: dict[str, list] = {}

    def hooks(self, layer):
        def forward(module, args, output):
            self.outputs.setdefault(layer.path, []).append((output[0] if isinstance(output, tuple) else output).detach())

        def backward(module, before, behind):
            self.gradients.setdefault(layer.path, []).append((before[0], behind[0]))

        module = self.model.get_submodule(layer.path)
        return [module.register_forward_hook(forward), module.register_full_backward_hook(backward)]

    @contextmanager
    def watch(self, layer):
        self.turns.append(layer.path)
        handles = self.hooks(layer)
        yield
        for handle in handles:
            handle.remove()


def whole(model, anatomy, data):
    """The same, of the model run as a whole."""
    seen = Seen(model)
    handles = [h for layer in anatomy.layers() for h in seen.hooks(layer)]
    handles.append(model.get_submodule(anatomy.embed_path).register_forward_hook(lambda m, args, out: out.requires_grad_()))
    with torch.enable_grad():
        for batch in data:
            given = dict(batch.inputs)
            if "pixel_values" in given:
                given["pixel_values"] = given["pixel_values"].clone().requires_grad_()
            task_loss(model(**given, use_cache=False).logits, batch.targets).backward()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("vision", "language"), [*((v, "llama") for v in VISION), *(("clip", x) for x in LANGUAGE if x != "llama")])
def test_every_layer_sees_what_it_sees_in_the_whole_model(vision, language):
    model, data = build(vision, language), batches()
    anatomy = find_anatomy(model)
    expected, seen = whole(model, anatomy, data), Seen(model)
    Walk(model, anatomy, data, seen.watch).forward_and_back(task_loss)
    assert seen.turns == [x.path for x in [*reversed(anatomy.language.layers), *reversed(anatomy.vision.layers)]]
    # Where a hidden state is picked out of the tower, PyTorch's hook on that layer is passed by in the whole model.
    assert seen.gradients.keys() - expected.gradients.keys() <= {anatomy.vision.layers[-1].path}
    assert expected.gradients.keys() <= seen.gradients.keys()
    for path in expected.outputs:
        assert len(seen.outputs[path]) == len(expected.outputs[path])
        for ours, theirs in zip(seen.outputs[path], expected.outputs[path], strict=True):
            torch.testing.assert_close(ours, theirs)
    for path in expected.gradients:
        for ours, theirs in zip(seen.gradients[path], expected.gradients[path], strict=True):
            for mine, its in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6 * float(its.abs().max()))


def test_forward_alone_goes_in_depth_order_and_asks_for_no_gradient():
    model, data = build(), batches()
    anatomy = find_anatomy(model)
    seen, done, started = Seen(model), [], []
    Walk(model, anatomy, data, seen.watch, start=started.append, advance=done.append).forward()
    assert seen.turns == [x.path for x in done] == [x.path for x in anatomy.layers()]
    assert not seen.gradients and not any(x.requires_grad for some in seen.outputs.values() for x in some)
    with_images = [b for b in data if "pixel_values" in b.inputs]
    assert len(started) == len(anatomy.vision.layers) * len(with_images) + len(anatomy.language.layers) * len(data)


def test_the_model_is_left_as_it_was():
    model, data = build(), batches()
    before = {name: p.clone() for name, p in model.named_parameters()}
    whole_before = model(**data[-1].inputs, use_cache=False).logits
    hooks = lambda: [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    hooks_before = hooks()

    def fails(logits, targets):
        raise RuntimeError("a loss that cannot be computed")

    with pytest.raises(RuntimeError, match="cannot be computed"):
        Walk(model, find_anatomy(model), data, Seen(model).watch).forward_and_back(fails)
    assert hooks() == hooks_before and not any("forward" in vars(m) for m in model.modules())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert torch.equal(model(**data[-1].inputs, use_cache=False).logits, whole_before)


class Killed(BaseException):
    """Not an error that anything would catch."""


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("back", [False, True])
def test_a_killed_walk_goes_on_where_it_was(tmp_path, at, back):
    model, data = build(), batches()
    anatomy = find_anatomy(model)

    def walk(directory, finish, seen):
        walking = Walk(model, anatomy, data, seen.watch, finish=finish, directory=directory)
        return walking.forward_and_back(task_loss) if back else walking.forward()

    whole_turns, first, second = Seen(model), Seen(model), Seen(model)
    walk(None, lambda layer: None, whole_turns)
    finished = []

    def dies(layer):
        if len(finished) == at:
            raise Killed
        finished.append(layer.path)

    with pytest.raises(Killed):
        walk(tmp_path, dies, first)
    assert not any("forward" in vars(m) for m in model.modules())
    walk(tmp_path, lambda layer: finished.append(layer.path), second)
    assert first.turns[:at] == finished[:at], "a turn is over when what it made is kept"
    assert finished == whole_turns.turns and second.turns == whole_turns.turns[at:]
    for kind in ("outputs", "gradients"):
        ours, expected = getattr(second, kind), getattr(whole_turns, kind)
        for path in second.turns:
            for mine, its in zip(ours.get(path, []), expected.get(path, []), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


def test_a_finished_walk_keeps_little_and_is_not_taken_again(tmp_path):
    model, data = build(), batches()
    anatomy = find_anatomy(model)
    done = []
    for _ in range(2):
        seen = Seen(model)
        Walk(model, anatomy, data, seen.watch, advance=done.append, directory=tmp_path).forward_and_back(task_loss)
    assert not seen.turns and len(done) == 2 * len(list(anatomy.layers()))
    kept = {p.name for p in tmp_path.iterdir()}
    assert not any(name.startswith("back.") for name in kept - {"back.vision.0", "back.language.0"})
