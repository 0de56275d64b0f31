"""Two-sided low-rank approximation against the truncated SVD of the explicitly weighted matrix."""

import pytest
import torch

from infoprune_export.compress.lowrank import Weighting, factorise, nothing_seen, spectrum, weighting
from infoprune_export.compress.moments import InputScale, Moments
from infoprune_export.compress.statistics import Statistics
from infoprune_export.models.anatomy import Linear


def _case(d_out, d_in, bias=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, dtype=torch.float64, generator=g)
    mix = torch.randn(d_in, d_in, dtype=torch.float64, generator=g) * torch.logspace(0, -2, d_in, dtype=torch.float64)
    x = torch.randn(500, d_in, dtype=torch.float64, generator=g) @ mix.T + (1.0 if bias else 0.0)
    gradient = torch.randn(500, d_out, dtype=torch.float64, generator=g) * torch.logspace(0, -1, d_out, dtype=torch.float64)
    return Linear(path="m", d_in=d_in, d_out=d_out, bias=bias), weight, x, gradient


def _weighting(linear, weight, x, gradient):
    """The exact weights on the smaller side, without the isotropic floor."""
    if linear.d_out > linear.d_in:
        h = gradient @ weight
        return Weighting(x.T @ x / len(x), h.T @ h / len(x), x.mean(0))
    y = x @ weight.T
    return Weighting(y.T @ y / len(x), gradient.T @ gradient / len(x), y.mean(0))


@pytest.mark.parametrize(("d_out", "d_in"), [(20, 12), (12, 20), (12, 12)])
def test_reaches_the_optimum_of_the_weighted_norm(d_out, d_in):
    linear, weight, x, gradient = _case(d_out, d_in)
    w = _weighting(linear, weight, x, gradient)
    pair = factorise(linear, weight, None, w, 5)

    def root(moment):
        values, vectors = torch.linalg.eigh(moment)
        return vectors * values.clamp_min(0).sqrt() @ vectors.T

    left, right = root(gradient.T @ gradient / len(x)), root(x.T @ x / len(x))
    singular = torch.linalg.svdvals(left @ weight @ right)
    error = torch.linalg.norm(left @ (weight - (pair["second"].double() @ pair["first"].double())) @ right)
    assert error.item() == pytest.approx(singular[5:].norm().item(), rel=1e-4)
    torch.testing.assert_close(spectrum(linear, w)[: min(d_out, d_in)], singular, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("d_out", "d_in"), [(20, 12), (12, 20)])
def test_full_rank_changes_nothing(d_out, d_in):
    linear, weight, x, gradient = _case(d_out, d_in)
    w = _weighting(linear, weight, x, gradient)
    pair = factorise(linear, weight, None, w, 12)
    torch.testing.assert_close(x @ (pair["second"] @ pair["first"]).double().T, x @ weight.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("d_out", "d_in"), [(20, 12), (12, 20)])
def test_what_is_dropped_keeps_its_mean_in_the_bias(d_out, d_in):
    linear, weight, x, gradient = _case(d_out, d_in, bias=True)
    bias = torch.randn(d_out, dtype=torch.float64)
    w = _weighting(linear, weight, x, gradient)
    pair = factorise(linear, weight, bias, w, 3)
    before = (x @ weight.T + bias).mean(0)
    after = (x @ (pair["second"] @ pair["first"]).double().T + pair["bias"].double()).mean(0)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("d_out", "d_in"), [(20, 12), (12, 20)])
def test_rank_deficient_moments_never_give_nan(d_out, d_in):
    """Three samples, dead inputs and one gradient: what the samples show is still reproduced."""
    linear, weight, x, gradient = _case(d_out, d_in)
    x[:, :4] = 0
    x, gradient = x[:3], gradient[:1]
    widens = d_out > d_in
    data, grads = Moments.zeros(12), Moments.zeros(12)
    data.add(x if widens else x @ weight.T)
    grads.add(gradient @ weight if widens else gradient)
    stats = Statistics(gradients={"k": grads}, gradient_energy={"k": float(gradient.square().sum()) / d_out}, samples=1)
    pair = factorise(linear, weight, None, weighting("loss", "k", linear, weight, data, stats), 8)
    assert all(torch.isfinite(t).all() for t in pair.values())
    torch.testing.assert_close(x @ (pair["second"] @ pair["first"]).double().T, x @ weight.T, rtol=1e-3, atol=1e-2)


def test_weights_without_gradients_are_relative_to_the_output():
    linear, weight, x, _ = _case(12, 20)
    moments = Moments.zeros(12)
    moments.add(x @ weight.T)
    small = weighting("activation", "k", linear, weight, moments, Statistics())
    scaled = Moments.zeros(12)
    scaled.add(10 * x @ weight.T)
    large = weighting("activation", "k", linear, 10 * weight, scaled, Statistics())
    torch.testing.assert_close(spectrum(linear, small), spectrum(linear, large), rtol=1e-4, atol=1e-6)
    assert spectrum(linear, small).square().sum().item() == pytest.approx(1, rel=1e-4)


SHAPES = [(20, 12), (12, 20), (12, 12)]


def _seen(rule, linear, weight, x):
    """What a rule sees of inputs x, filled the way the hooks fill it."""
    seen = nothing_seen(rule, linear)
    if seen is not None:
        seen.add(x if isinstance(seen, InputScale) or linear.d_out > linear.d_in else x @ weight.T)
    return seen


def _approximation(rule, linear, weight, x, rank):
    pair = factorise(linear, weight, None, weighting(rule, "k", linear, weight, _seen(rule, linear, weight, x), Statistics()), rank)
    return pair["second"].double() @ pair["first"].double()


def _truncated(matrix, rank):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_activation_is_svd_llm(d_out, d_in):
    """SVD-LLM as published: W S with S the Cholesky factor of the sum of x x^T, truncated, S undone."""
    linear, weight, x, _ = _case(d_out, d_in)
    s = torch.linalg.cholesky(x.T @ x)
    expected = _truncated(weight @ s, 5) @ torch.linalg.inv(s)
    torch.testing.assert_close(_approximation("activation", linear, weight, x, 5), expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_asvd_is_as_published(d_out, d_in):
    linear, weight, x, _ = _case(d_out, d_in)
    s = torch.diag(x.abs().mean(0) ** 0.5)
    expected = _truncated(weight @ s, 5) @ torch.linalg.inv(s)
    torch.testing.assert_close(_approximation("asvd", linear, weight, x, 5), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_without_weights_it_is_the_plain_svd(d_out, d_in):
    linear, weight, x, _ = _case(d_out, d_in)
    torch.testing.assert_close(_approximation("none", linear, weight, x, 5), _truncated(weight, 5), rtol=1e-4, atol=1e-4)
    found = spectrum(linear, weighting("none", "k", linear, weight, None, Statistics()))
    singular = torch.linalg.svdvals(weight)
    torch.testing.assert_close(found, singular / singular.norm(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_each_rule_wins_by_its_own_measure(d_out, d_in):
    linear, weight, x, _ = _case(d_out, d_in)
    measures = {
        "none": lambda gap: gap.norm(),
        "asvd": lambda gap: (gap * x.abs().mean(0) ** 0.5).norm(),
        "activation": lambda gap: (x @ gap.T).norm(),
    }
    gaps = {rule: weight - _approximation(rule, linear, weight, x, 5) for rule in measures}
    for rule, measure in measures.items():
        assert measure(gaps[rule]) == min(measure(gap) for gap in gaps.values())


@pytest.mark.parametrize("data", ["nothing", "one sample", "dead channels", "huge", "tiny"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
@pytest.mark.parametrize("rule", ["loss", "activation", "asvd", "none"])
def test_every_rule_stays_finite_on_poor_data(rule, d_out, d_in, bias, data):
    linear, weight, x, gradient = _case(d_out, d_in, bias)
    if data == "nothing":
        x = torch.zeros_like(x)
    elif data == "one sample":
        x, gradient = x[:1], gradient[:1]
    elif data == "dead channels":
        x[:, ::2] = 0
        gradient[:, ::2] = 0
    else:
        x, gradient = (t * (1e4 if data == "huge" else 1e-6) for t in (x, gradient))
    grads = Moments.zeros(12)
    grads.add(gradient @ weight if d_out > d_in else gradient)
    stats = Statistics(gradients={"k": grads}, gradient_energy={"k": float(gradient.square().sum()) / d_out}, samples=len(x))
    w = weighting(rule, "k", linear, weight, _seen(rule, linear, weight, x), stats)
    assert torch.isfinite(spectrum(linear, w)).all()
    for rank in (1, 8, 12):
        pair = factorise(linear, weight, torch.zeros(d_out) if bias else None, w, rank)
        assert all(torch.isfinite(t).all() for t in pair.values())
        assert pair["first"].shape == (rank, d_in)
        assert pair["second"].shape == (d_out, rank)


def test_asvd_undoes_channels_that_were_never_used():
    linear, weight, x, _ = _case(12, 20)
    x[:, :5] = 0
    torch.testing.assert_close(_approximation("asvd", linear, weight, x, 12), weight, rtol=1e-4, atol=1e-4)
