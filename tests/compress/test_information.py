"""Effective rank and KS distance against closed forms."""

import numpy as np
import pytest
import scipy.stats
import torch

from infoprune_export.compress.information import effective_rank, ks_distance
from infoprune_export.compress.spectra import spectrum_of_moment, symmetric_power


def test_effective_rank_of_equal_values_is_their_number():
    assert effective_rank(np.full(7, 3.0)) == pytest.approx(7)


def test_effective_rank_of_rank_one_is_one():
    assert effective_rank([5.0, 0, 0]) == pytest.approx(1)


def test_effective_rank_of_two_values_is_their_entropy():
    p = np.array([0.25, 0.75])
    assert effective_rank(p * 8) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_effective_rank_of_nothing_is_zero():
    assert effective_rank(np.zeros(3)) == 0


@pytest.mark.parametrize("bad", [[-1.0, 2.0], [np.nan, 1.0], [np.inf]])
def test_effective_rank_refuses_what_is_no_spectrum(bad):
    with pytest.raises(ValueError, match="finite and non-negative"):
        effective_rank(bad)


def test_effective_rank_does_not_change_under_rotation_and_scaling():
    a = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    assert effective_rank(torch.linalg.svdvals(3 * q @ a)) == pytest.approx(effective_rank(torch.linalg.svdvals(a)))


def test_ks_of_truncation_is_the_mass_lost():
    s = np.array([5.0, 3.0, 1.5, 0.5])
    assert ks_distance(s, s[:2]) == pytest.approx(0.2)
    assert ks_distance(s, s[:2], absolute=True) == pytest.approx(2.0)


def test_ks_of_the_same_spectrum_is_zero_in_any_order():
    assert ks_distance([3.0, 1.0, 2.0], [2.0, 3.0, 1.0]) == 0


def test_ks_sees_mass_that_is_gained():
    assert ks_distance([1.0, 1.0], [2.0, 1.0]) == pytest.approx(0.5)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_ks_does_not_change_under_rotation_and_scaling(rank):
    g = torch.Generator().manual_seed(3)
    a = torch.randn(9, 9, dtype=torch.float64, generator=g)
    q, r = (torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64, generator=g)).Q for _ in range(2))
    plain, turned = (torch.linalg.svdvals(x) for x in (a, 3 * q @ a @ r))
    assert ks_distance(turned, turned[:rank]) == pytest.approx(ks_distance(plain, plain[:rank]))
    assert ks_distance(turned, turned[:rank], absolute=True) == pytest.approx(3 * ks_distance(plain, plain[:rank], absolute=True))


def test_ks_of_an_orthogonal_map_is_the_share_of_directions_lost():
    q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))).Q
    s = torch.linalg.svdvals(q)
    assert effective_rank(s) == pytest.approx(8)
    assert ks_distance(s, s[:6]) == pytest.approx(0.25)


def test_ks_of_rank_one_is_nothing_or_all():
    assert ks_distance([5.0, 0.0, 0.0], [5.0]) == 0
    assert ks_distance([5.0, 0.0, 0.0], []) == pytest.approx(1)


def test_repeated_values_count_as_often_as_they_occur():
    assert effective_rank([2.0, 2.0, 0.0]) == pytest.approx(2)
    assert ks_distance([2.0, 2.0, 1.0, 1.0], [2.0, 1.0, 1.0]) == pytest.approx(1 / 3)


def test_ks_is_a_distance_between_nothing_and_nothing():
    assert ks_distance([0.0, 0.0], [0.0]) == 0
    assert ks_distance([], []) == 0


def test_the_two_sample_test_says_nothing_under_truncation():
    """Why ours is defined over the index: on the sets of values the statistic is 1 - r/n for any matrix."""
    rng = np.random.default_rng(0)
    flat, steep = np.sort(rng.uniform(1, 2, 40))[::-1], np.sort(np.exp(-np.arange(40.0)))[::-1]
    for s in (flat, steep):
        assert scipy.stats.ks_2samp(s, s[:10]).statistic == pytest.approx(1 - 10 / 40)
    assert ks_distance(flat, flat[:10]) > 0.6
    assert ks_distance(steep, steep[:10]) < 1e-4


def test_symmetric_power_inverts_on_the_numerical_rank():
    a = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    m = a @ a.T
    root, inverse = symmetric_power(m, 0.5), symmetric_power(m, -0.5)
    torch.testing.assert_close(root @ root, m)
    projector = root @ inverse
    torch.testing.assert_close(projector @ projector, projector)
    assert torch.trace(projector).item() == pytest.approx(3)
    torch.testing.assert_close(spectrum_of_moment(m)[:3], torch.linalg.svdvals(a))
