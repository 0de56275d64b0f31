"""Two-sided low-rank approximation against the truncated SVD of the explicitly weighted matrix."""

import pytest
import torch

from infoprune_export.compress.lowrank import Weighting, factorise, spectrum, weighting
from infoprune_export.compress.statistics import Moments, Statistics
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
        return Weighting(x.T @ x / len(x), h.T @ h / len(x)), x.mean(0)
    y = x @ weight.T
    return Weighting(y.T @ y / len(x), gradient.T @ gradient / len(x)), y.mean(0)


@pytest.mark.parametrize(("d_out", "d_in"), [(20, 12), (12, 20), (12, 12)])
def test_reaches_the_optimum_of_the_weighted_norm(d_out, d_in):
    linear, weight, x, gradient = _case(d_out, d_in)
    w, mean = _weighting(linear, weight, x, gradient)
    pair = factorise(linear, weight, None, w, mean, 5)

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
    w, mean = _weighting(linear, weight, x, gradient)
    pair = factorise(linear, weight, None, w, mean, 12)
    torch.testing.assert_close(x @ (pair["second"] @ pair["first"]).double().T, x @ weight.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("d_out", "d_in"), [(20, 12), (12, 20)])
def test_what_is_dropped_keeps_its_mean_in_the_bias(d_out, d_in):
    linear, weight, x, gradient = _case(d_out, d_in, bias=True)
    bias = torch.randn(d_out, dtype=torch.float64)
    w, mean = _weighting(linear, weight, x, gradient)
    pair = factorise(linear, weight, bias, w, mean, 3)
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
    pair = factorise(linear, weight, None, weighting("k", linear, weight, data, stats), data.mean, 8)
    assert all(torch.isfinite(t).all() for t in pair.values())
    torch.testing.assert_close(x @ (pair["second"] @ pair["first"]).double().T, x @ weight.T, rtol=1e-3, atol=1e-2)


def test_weights_without_gradients_are_relative_to_the_output():
    linear, weight, x, _ = _case(12, 20)
    moments = Moments.zeros(12)
    moments.add(x @ weight.T)
    small = weighting("k", linear, weight, moments, Statistics(weighted=False))
    scaled = Moments.zeros(12)
    scaled.add(10 * x @ weight.T)
    large = weighting("k", linear, 10 * weight, scaled, Statistics(weighted=False))
    torch.testing.assert_close(spectrum(linear, small), spectrum(linear, large), rtol=1e-4, atol=1e-6)
    assert spectrum(linear, small).square().sum().item() == pytest.approx(1, rel=1e-4)
