"""Gates against closed forms, and their effect against networks in which units are really gone."""

import math

import pytest
import torch
from networks import LANGUAGE, VISION, build, inputs

from infoprune_export.compress.concrete import BETA, STRETCH, Gates, draw, open_probability, settled
from infoprune_export.compress.surgery import prune_heads
from infoprune_export.models.families import find_anatomy

LOG_A = torch.tensor([-3.0, -0.7, 0.0, 1.3, 4.0])


def uniform(n, seed=0):
    return torch.rand(n, len(LOG_A), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).clamp(1e-9, 1 - 1e-9)


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


def test_gates_that_are_all_open_change_nothing_and_closed_again_nothing_is_left():
    model, x = build(), inputs()
    before = model(**x, use_cache=False).logits
    gates = Gates(model, list(find_anatomy(model).layers()))
    assert torch.equal(model(**x, use_cache=False).logits, before)
    with gates.set(torch.ones(gates.count)):
        assert torch.equal(model(**x, use_cache=False).logits, before)
    gates.close()
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("vision", "language"), [*((v, "llama") for v in VISION), *(("clip", x) for x in LANGUAGE if x != "llama")])
def test_closed_gates_are_units_that_are_gone(vision, language):
    model, small, x = build(vision, language), build(vision, language), inputs()
    layers = list(find_anatomy(model).layers())
    gates = Gates(model, layers)
    z = torch.ones(gates.count)
    first = 0
    for layer in layers:
        a = layer.attention
        kept = list(range(a.kv_groups))[:: 2 if layer.index else 1]
        z[[first + g for g in range(a.kv_groups) if g not in kept]] = 0
        first += a.kv_groups
        prune_heads(small, a, [g * a.heads_per_group + i for g in kept for i in range(a.heads_per_group)], kept)
    with gates.set(z):
        got = model(**x, use_cache=False).logits
    torch.testing.assert_close(got, small(**x, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_threads_do_not_see_one_another_s_gates():
    from concurrent.futures import ThreadPoolExecutor

    model, x = build(), inputs()
    gates = Gates(model, list(find_anatomy(model).layers()))
    before = model(**x, use_cache=False).logits
    with gates.set(torch.zeros(gates.count)), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(lambda: model(**x, use_cache=False).logits).result(), before)
        assert not torch.allclose(model(**x, use_cache=False).logits, before)
