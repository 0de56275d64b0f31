"""Roots and leading eigenvectors: the fast ways against the exact ones, on widths made to count as wide."""

from __future__ import annotations

import pytest
import torch

from infoprune_export.compress import heads, spectra
from infoprune_export.compress.lowrank import Weighting, factorise, spectrum
from infoprune_export.compress.moments import Moments
from infoprune_export.compress.spectra import Root, spectrum_of_moment, top_eigenvectors
from infoprune_export.compress.statistics import Statistics
from infoprune_export.errors import InputError
from infoprune_export.models.anatomy import Linear


def moment(n, samples, decay, seed=0):
    """Second moment of vectors whose spread falls off as a power."""
    generator = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    x = torch.randn(samples, n, dtype=torch.float64, generator=generator) * torch.arange(1, n + 1).double() ** -decay @ turned
    return x.T @ x / samples


@pytest.fixture
def wide(monkeypatch):
    """Everything above 16 columns counts as wide."""
    for module in (spectra, heads):
        monkeypatch.setattr(module, "WIDE", 16)


@pytest.mark.parametrize("samples", [20, 300])
def test_a_triangular_root_is_a_root_and_can_be_undone(wide, samples):
    c = moment(60, samples, 0.5)
    root = Root.of(c)
    assert root.inverse is None
    torch.testing.assert_close(root.matrix @ root.matrix.T, c, rtol=0, atol=1e-8 * float(c.abs().max()))
    rows = torch.randn(5, 60, dtype=torch.float64)
    torch.testing.assert_close(root.undo(rows @ root.matrix), rows, rtol=1e-6, atol=1e-6)


def test_a_moment_of_nothing_has_a_root(wide):
    root = Root.of(torch.zeros(20, 20, dtype=torch.float64))
    assert torch.isfinite(root.matrix).all() and root.matrix.abs().max() < 1e-100


@pytest.mark.parametrize("size", [8, 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_refused(wide, size, value):
    c = torch.eye(size, dtype=torch.float64)
    c[3, 5] = c[5, 3] = value
    with pytest.raises(InputError, match="not finite"):
        Root.of(c)


@pytest.mark.parametrize("decay", [0.5, 1.5])
@pytest.mark.parametrize("count", [4, 30])
@pytest.mark.parametrize("oversampling", [16, 60])
def test_leading_eigenvectors_capture_what_the_exact_ones_do(wide, monkeypatch, decay, count, oversampling):
    """With the larger of both oversamplings all are computed; with the smaller, few are by iteration, where that suffices."""
    monkeypatch.setattr(spectra, "OVERSAMPLING", oversampling)
    c = moment(200, 800, decay)
    found = top_eigenvectors(c, count)
    torch.testing.assert_close(found.T @ found, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-10)
    values = torch.linalg.eigvalsh(c).flip(0)
    missed = float(c.trace() - torch.trace(found.T @ c @ found))
    assert missed <= 1.002 * float(values[count:].sum())
    assert torch.equal(found, top_eigenvectors(c, count)), "repeatable"


def test_iteration_that_does_not_suffice_says_so(monkeypatch):
    monkeypatch.setattr(spectra, "OVERSAMPLING", 4)
    steep, flat = (moment(200, 4000, decay).float() for decay in (1.5, 0.0))
    assert spectra._by_iteration(steep, 8) is not None and spectra._by_iteration(flat, 8) is None


@pytest.mark.parametrize("samples", [0, 3])
def test_a_moment_of_few_samples_has_leading_eigenvectors(wide, monkeypatch, samples):
    monkeypatch.setattr(spectra, "OVERSAMPLING", 4)
    c = moment(60, samples, 0.5) if samples else torch.zeros(60, 60, dtype=torch.float64)
    found = top_eigenvectors(c, 8)
    torch.testing.assert_close(found.T @ found, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-10)
    assert float(c.trace() - torch.trace(found.T @ c @ found)) <= 1e-6 * float(c.trace())


def test_products_of_which_half_is_known_are_the_whole(wide, monkeypatch):
    monkeypatch.setattr(spectra, "BLOCK", 8)
    a, m = torch.randn(30, 20, dtype=torch.float64), moment(20, 60, 0.3)
    torch.testing.assert_close(spectra.gram(a), a.T @ a, rtol=0, atol=1e-5)
    root = Root.of(moment(20, 60, 0.5, seed=1))
    assert root.inverse is None
    torch.testing.assert_close(root.around(m).double(), root.matrix.T @ m @ root.matrix, rtol=0, atol=1e-6)


@pytest.mark.parametrize("samples", [24, 400])
@pytest.mark.parametrize("sizes", [(40, 90), (90, 40)])
def test_pairs_made_the_fast_way_are_as_good(monkeypatch, sizes, samples):
    d_in, d_out = sizes
    torch.manual_seed(1)
    weight = torch.randn(d_out, d_in, dtype=torch.float64) / d_in**0.5
    inputs, gradients = moment(d_in, samples, 0.8), moment(d_out, samples, 0.3, seed=2)
    gradients += 0.1 * torch.trace(gradients) / d_out * torch.eye(d_out, dtype=torch.float64)
    narrow = d_out <= d_in
    w = Weighting(
        weight @ inputs @ weight.T if narrow else inputs,
        gradients if narrow else weight.T @ gradients @ weight,
        torch.zeros(min(sizes), dtype=torch.float64),
    )
    linear = Linear(path="x", d_in=d_in, d_out=d_out)

    def error():
        pair = factorise(linear, weight, None, w, 10)
        left = weight - pair["second"].double() @ pair["first"].double()
        return float(torch.trace(gradients @ left @ inputs @ left.T)), spectrum(linear, w)

    exact, values = error()
    for module in (spectra,):
        monkeypatch.setattr(module, "WIDE", 16)
    fast, again = error()
    assert fast <= 1.002 * exact
    torch.testing.assert_close(again, values, rtol=0, atol=1e-4 * float(values[0]))


def test_heads_are_ranked_in_a_subspace_as_they_are_in_the_whole_space(monkeypatch):
    from networks import build

    from infoprune_export.models.families import find_anatomy

    model = build()
    layer = find_anatomy(model).language.layers[0]
    o, width = layer.attention.o, layer.attention.o.d_out
    outer = moment(o.d_in, 300, 0.5)
    stats = Statistics(samples=300)
    stats.attention["language.0.o"] = Moments(torch.zeros(o.d_in, dtype=torch.float64), outer * 300, 300)
    stats.gradients["language.0.o"] = Moments(torch.zeros(width, dtype=torch.float64), moment(width, 300, 1.0, seed=3) * 300, 300)
    weight = model.get_submodule(o.path).weight
    exact = heads.score_layer(layer, weight, stats, 0.0)
    for module in (spectra, heads):
        monkeypatch.setattr(module, "WIDE", 16)
    monkeypatch.setattr(heads, "SUBSPACE", 24)
    fast = heads.score_layer(layer, weight, stats, 0.0)
    assert sorted(range(3), key=lambda u: exact[u].ks) == sorted(range(3), key=lambda u: fast[u].ks)
    for a, b in zip(exact, fast, strict=True):
        assert abs(a.ks - b.ks) < 0.2 * a.ks and a.erank == pytest.approx(b.erank, rel=1e-3)


def test_a_spectrum_has_no_negative_values():
    assert spectrum_of_moment(torch.diag(torch.tensor([4.0, -1e-12, 1.0]))).tolist() == [2.0, 1.0, 0.0]
