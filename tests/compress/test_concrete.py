"""Gates against closed forms, and their effect against networks in which units are really gone."""

import math

import pytest
import torch
from networks import LANGUAGE, VISION, build, inputs

from infoprune_export.compress.concrete import BETA, STRETCH, Gates, draw, open_probability, prediction, settled
from infoprune_export.compress.heads import refit_output
from infoprune_export.compress.statistics import Batch, gather
from infoprune_export.compress.surgery import dense, head_rows, prune_heads
from infoprune_export.models.families import find_anatomy

LOG_A = torch.tensor([-3.0, -0.7, 0.0, 1.3, 4.0])


def uniform(n, seed=0):
    return torch.rand(n, len(LOG_A), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).clamp(1e-9, 1 - 1e-9)


def calibration(model):
    x = inputs(batch=12)
    targets = torch.full_like(x["input_ids"], -100)
    targets[:, -2:] = x["input_ids"][:, -2:]
    return gather(model, find_anatomy(model), [Batch(x, targets)])


def test_probabilities_of_open_and_of_fully_open_are_the_closed_forms():
    z = draw(LOG_A.double(), uniform(200_000))
    assert (z >= 0).all() and (z <= 1).all()
    torch.testing.assert_close((z > 0).double().mean(0), open_probability(LOG_A.double()), rtol=0, atol=4e-3)
    # z = 1 where s >= (1 - gamma) / (zeta - gamma), and s has a logistic distribution function in its logit.
    edge = math.log((1 - STRETCH[0]) / (STRETCH[1] - 1))
    torch.testing.assert_close((z == 1).double().mean(0), torch.sigmoid(LOG_A.double() - BETA * edge), rtol=0, atol=4e-3)


def test_the_mean_is_the_integral_of_the_distribution():
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1] + 1 / 8000
    level = (t - STRETCH[0]) / (STRETCH[1] - STRETCH[0])
    above = torch.sigmoid(LOG_A.double() - BETA * torch.logit(level)[:, None])
    torch.testing.assert_close(draw(LOG_A.double(), uniform(200_000)).mean(0), above.mean(0), rtol=0, atol=3e-3)


def test_settled_gates_reach_both_ends():
    assert settled(torch.tensor([-30.0, 0.0, 30.0])).tolist() == [0.0, 0.5, 1.0]
    first_open = torch.logit(torch.tensor(-STRETCH[0] / (STRETCH[1] - STRETCH[0])))
    assert settled(first_open - 0.01) == 0 < settled(first_open + 0.01)


def test_the_gradient_reaches_gates_that_are_not_at_an_end():
    log_a = LOG_A.clone().requires_grad_()
    draw(log_a, torch.full_like(LOG_A, 0.5)).sum().backward()
    assert log_a.grad[2] > 0
    assert log_a.grad[0] == log_a.grad[4] == 0


@pytest.mark.parametrize("bias", [False, True])
def test_binary_gates_predict_as_the_refit_does(bias):
    g = torch.Generator().manual_seed(1)
    z = torch.randn(500, 12, generator=g, dtype=torch.float64) @ torch.randn(12, 12, generator=g, dtype=torch.float64) + 1
    weight, second, mean = torch.randn(7, 12, generator=g), z.T @ z / 500, z.mean(0)
    kept = [0, 1, 2, 6, 7, 8]
    refit = refit_output(weight, torch.zeros(7) if bias else None, second, mean, kept)
    moment = second - torch.outer(mean, mean) if bias else second
    linear = prediction(torch.tensor([1.0, 0.0, 1.0, 0.0]), moment)
    torch.testing.assert_close((linear @ weight.double().T)[kept], refit["weight"].double().T, rtol=1e-4, atol=1e-4)
    assert not linear[[3, 4, 5, 9, 10, 11]].any()


def test_open_gates_predict_everything_and_a_lonely_unit_is_merely_gated():
    g = torch.Generator().manual_seed(2)
    root = torch.randn(6, 6, generator=g, dtype=torch.float64)
    torch.testing.assert_close(prediction(torch.ones(3), root @ root.T), torch.eye(6, dtype=torch.float64))
    alone = torch.block_diag(*[x @ x.T for x in torch.randn(3, 2, 2, generator=g, dtype=torch.float64)])
    z = torch.tensor([0.3, 1.0, 0.8])
    expected = torch.diag(z.double().repeat_interleave(2))
    torch.testing.assert_close(prediction(z, alone), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("moment", [torch.zeros(6, 6, dtype=torch.float64), torch.ones(6, 6, dtype=torch.float64)])
def test_moments_without_data_or_without_rank_give_finite_gates_and_gradients(moment):
    z = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    linear = prediction(z, moment)
    linear.sum().backward()
    assert torch.isfinite(linear).all() and torch.isfinite(z.grad).all()


@pytest.mark.parametrize("refitted", [False, True])
def test_gates_that_are_all_open_change_nothing_and_closed_again_nothing_is_left(refitted):
    model, x = build(), inputs()
    stats = calibration(model) if refitted else None
    before = model(**x, use_cache=False).logits
    gates = Gates(model, list(find_anatomy(model).layers()), stats)
    assert torch.equal(model(**x, use_cache=False).logits, before)
    with gates.set(torch.ones(gates.count)):
        torch.testing.assert_close(model(**x, use_cache=False).logits, before, rtol=1e-4, atol=1e-4 if refitted else 0)
    gates.close()
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("refitted", [False, True])
@pytest.mark.parametrize(("vision", "language"), [*((v, "llama") for v in VISION), *(("clip", x) for x in LANGUAGE if x != "llama")])
def test_closed_gates_are_units_that_are_gone(vision, language, refitted):
    model, small, x = build(vision, language), build(vision, language), inputs()
    stats = calibration(model) if refitted else None
    layers = list(find_anatomy(model).layers())
    gates = Gates(model, layers, stats)
    z = torch.ones(gates.count)
    first = 0
    for layer in layers:
        a = layer.attention
        kept = list(range(a.kv_groups))[:: 2 if layer.index else 1]
        z[[first + g for g in range(a.kv_groups) if g not in kept]] = 0
        first += a.kv_groups
        heads = [g * a.heads_per_group + i for g in kept for i in range(a.heads_per_group)]
        projection = small.get_submodule(a.o.path)
        prune_heads(small, a, heads, kept)
        if refitted and len(kept) < a.kv_groups:
            m = stats.attention[f"{layer.tower}.{layer.index}.o"]
            refit = refit_output(projection.weight, projection.bias, m.second, m.mean, head_rows(a, heads))
            small.set_submodule(a.o.path, dense(refit["weight"], refit.get("bias")))
    with gates.set(z):
        got = model(**x, use_cache=False).logits
    expected = small(**x, use_cache=False).logits
    scale = float(expected.abs().max())
    torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=2e-3 if refitted else 1e-5)


def test_threads_do_not_see_one_another_s_gates():
    from concurrent.futures import ThreadPoolExecutor

    model, x = build(), inputs()
    gates = Gates(model, list(find_anatomy(model).layers()), None)
    before = model(**x, use_cache=False).logits
    with gates.set(torch.zeros(gates.count)), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(lambda: model(**x, use_cache=False).logits).result(), before)
        assert not torch.allclose(model(**x, use_cache=False).logits, before)
