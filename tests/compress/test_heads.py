"""Head scores and compensation on blocks whose answer is known."""

import pytest
import torch

from infoprune_export.compress.heads import refit_output, score_layer
from infoprune_export.compress.statistics import Moments, Statistics
from infoprune_export.models.anatomy import Attention, FeedForward, Layer, Linear


def _layer(heads=4, groups=4, head_dim=3, hidden=10):
    def linear(d_out, d_in):
        return Linear(path="x", d_out=d_out, d_in=d_in)

    attention = Attention(
        path="a",
        heads=heads,
        kv_groups=groups,
        head_dim=head_dim,
        q=linear(heads * head_dim, hidden),
        k=linear(groups * head_dim, hidden),
        v=linear(groups * head_dim, hidden),
        o=linear(hidden, heads * head_dim),
    )
    ffn = FeedForward(path="f", gate=None, up=linear(20, hidden), down=linear(hidden, 20))
    return Layer(tower="language", index=0, path="l", attention=attention, ffn=ffn)


def _statistics(z, gradient):
    stats = Statistics(samples=len(gradient))
    stats.attention["language.0.o"] = Moments.zeros(z.shape[1])
    stats.attention["language.0.o"].add(z)
    stats.gradients["language.0.o"] = Moments.zeros(gradient.shape[1])
    stats.gradients["language.0.o"].add(gradient)
    return stats


def test_a_dead_head_scores_zero_and_a_louder_one_scores_more():
    layer, g = _layer(), torch.Generator().manual_seed(0)
    z = torch.randn(400, 12, generator=g) * torch.tensor([0.0, 0.5, 1.0, 2.0]).repeat_interleave(3)
    weight = torch.eye(10, 12)
    weight[:, :] = torch.linalg.qr(torch.randn(12, 10, generator=g)).Q.T
    scores = [s.ks for s in score_layer(layer, weight, _statistics(z, torch.randn(400, 10, generator=g)), 0.0)]
    assert scores[0] == pytest.approx(0, abs=1e-6)
    assert scores[1] < scores[2] < scores[3]


def test_a_head_whose_output_the_loss_does_not_see_scores_little():
    layer, g = _layer(), torch.Generator().manual_seed(1)
    z = torch.randn(400, 12, generator=g)
    weight = torch.zeros(10, 12)
    weight[:9, :9] = torch.eye(9)
    gradient = torch.randn(400, 10, generator=g)
    gradient[:, 3:6] *= 1e-3
    scores = [s.ks for s in score_layer(layer, weight, _statistics(z, gradient), 0.0)]
    assert scores[1] < 0.5 * min(scores[0], scores[2])


def test_groups_are_scored_with_all_their_query_heads():
    layer, g = _layer(heads=6, groups=3, head_dim=2), torch.Generator().manual_seed(2)
    scores = score_layer(
        layer, torch.randn(10, 12, generator=g), _statistics(torch.randn(99, 12, generator=g), torch.randn(99, 10, generator=g)), 0.5
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
