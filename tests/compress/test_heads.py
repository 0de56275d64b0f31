"""Head scores and compensation on blocks whose answer is known."""

import pytest
import torch
from blocks import layer_of, statistics_of

from infoprune_export.compress.heads import fold_mean, refit_output, score_layer


def test_a_dead_head_scores_zero_and_a_louder_one_scores_more():
    layer, g = layer_of(), torch.Generator().manual_seed(0)
    z = torch.randn(400, 12, generator=g) * torch.tensor([0.0, 0.5, 1.0, 2.0]).repeat_interleave(3)
    weight = torch.eye(10, 12)
    weight[:, :] = torch.linalg.qr(torch.randn(12, 10, generator=g)).Q.T
    scores = [s.ks for s in score_layer(layer, weight, statistics_of(z, torch.randn(400, 10, generator=g)), 0.0)]
    assert scores[0] == pytest.approx(0, abs=1e-6)
    assert scores[1] < scores[2] < scores[3]


def test_a_head_whose_output_the_loss_does_not_see_scores_little():
    layer, g = layer_of(), torch.Generator().manual_seed(1)
    z = torch.randn(400, 12, generator=g)
    weight = torch.zeros(10, 12)
    weight[:9, :9] = torch.eye(9)
    gradient = torch.randn(400, 10, generator=g)
    gradient[:, 3:6] *= 1e-3
    scores = [s.ks for s in score_layer(layer, weight, statistics_of(z, gradient), 0.0)]
    assert scores[1] < 0.5 * min(scores[0], scores[2])


def test_groups_are_scored_with_all_their_query_heads():
    layer, g = layer_of(heads=6, groups=3, head_dim=2), torch.Generator().manual_seed(2)
    scores = score_layer(
        layer, torch.randn(10, 12, generator=g), statistics_of(torch.randn(99, 12, generator=g), torch.randn(99, 10, generator=g)), 0.5
    )
    assert [s.group for s in scores] == [0, 1, 2]
    assert all(0 < s.erank <= 1 for s in scores)
    assert all(s.score == pytest.approx(s.ks * (0.5 + 0.5 * s.erank)) for s in scores)


@pytest.mark.parametrize("bias", [None, torch.arange(5, dtype=torch.float32)])
def test_refit_is_exact_when_the_dropped_heads_follow_from_the_kept(bias):
    g = torch.Generator().manual_seed(3)
    kept_z = torch.randn(300, 4, dtype=torch.float64, generator=g) + 1
    z = torch.cat([kept_z, kept_z @ torch.randn(4, 3, dtype=torch.float64, generator=g)], 1)
    weight = torch.randn(5, 7, generator=g)
    out = refit_output(weight, bias, z.T @ z / 300, z.mean(0), [0, 1, 2, 3])
    expected = z @ weight.double().T + (0 if bias is None else bias.double())
    got = kept_z @ out["weight"].double().T + (0 if bias is None else out["bias"].double())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_refit_with_a_bias_keeps_the_mean_of_unrelated_heads():
    g = torch.Generator().manual_seed(4)
    z = torch.randn(5000, 6, dtype=torch.float64, generator=g) + 3
    weight, bias = torch.randn(4, 6, generator=g), torch.zeros(4)
    out = refit_output(weight, bias, z.T @ z / 5000, z.mean(0), [0, 1, 2])
    after = (z[:, :3] @ out["weight"].double().T + out["bias"].double()).mean(0)
    torch.testing.assert_close(after, (z @ weight.double().T).mean(0), rtol=1e-5, atol=1e-5)


def test_refit_without_data_keeps_the_weights():
    weight = torch.randn(4, 6)
    out = refit_output(weight, None, torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64), [1, 2])
    torch.testing.assert_close(out["weight"], weight[:, [1, 2]])


def test_a_head_that_repeats_another_is_worth_less_than_one_of_its_own():
    """Heads 0 and 1 say the same in other directions of the output, head 2 says something else, all equally loud."""
    g = torch.Generator().manual_seed(5)
    own = torch.randn(4000, 6, generator=g)
    z = torch.cat([own[:, :3], own[:, :3], own[:, 3:]], 1)
    weight = torch.eye(10, 9)
    scores = [s.ks for s in score_layer(layer_of(heads=3, groups=3), weight, statistics_of(z, torch.randn(4000, 10, generator=g)), 0.0)]
    assert scores[0] == pytest.approx(scores[1], rel=0.05)
    assert scores[0] < 0.6 * scores[2]


def test_scores_do_not_change_when_the_residual_stream_is_rotated():
    g = torch.Generator().manual_seed(6)
    z, gradient, weight = (torch.randn(n, m, generator=g) for n, m in ((300, 12), (300, 10), (10, 12)))
    q = torch.linalg.qr(torch.randn(10, 10, generator=g)).Q
    before = score_layer(layer_of(), weight, statistics_of(z, gradient), 0.5)
    after = score_layer(layer_of(), q @ weight, statistics_of(z, gradient @ q.T), 0.5)
    assert [s.score for s in after] == pytest.approx([s.score for s in before], rel=1e-4)


def test_scores_grow_with_the_loss_and_relative_ones_with_nothing():
    g = torch.Generator().manual_seed(7)
    z, gradient, weight = (torch.randn(n, m, generator=g) for n, m in ((300, 12), (300, 10), (10, 12)))
    score = lambda stats, weighted: [s.ks for s in score_layer(layer_of(), weight, stats, 0.0, weighted=weighted)]
    assert score(statistics_of(z, 3 * gradient), True) == pytest.approx([3 * x for x in score(statistics_of(z, gradient), True)], rel=1e-4)
    assert score(statistics_of(5 * z, gradient), False) == pytest.approx(score(statistics_of(z, gradient), False), rel=1e-4)


@pytest.mark.parametrize("bias", [None, torch.arange(4, dtype=torch.float32)])
def test_folding_keeps_the_mean_output(bias):
    g = torch.Generator().manual_seed(8)
    z = torch.randn(500, 6, dtype=torch.float64, generator=g) + 3
    weight = torch.randn(4, 6, generator=g)
    out = fold_mean(weight, bias, z.mean(0), [0, 2, 5])
    before = (z @ weight.double().T).mean(0) + (0 if bias is None else bias)
    after = (z[:, [0, 2, 5]] @ out["weight"].double().T + out["bias"]).mean(0)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
