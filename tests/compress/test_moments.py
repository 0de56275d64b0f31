import pytest
import torch

from infoprune_export.compress.moments import InputScale, Moments, TokenWeights

IMAGE = 9
IDS = torch.tensor([[IMAGE, IMAGE, IMAGE, IMAGE, 1, 2], [IMAGE, IMAGE, 1, 2, 3, 4]])


def weights(share: float | None, ids: torch.Tensor = IDS) -> torch.Tensor | None:
    tokens = TokenWeights(share, IMAGE)
    tokens.start(ids)
    assert tokens.of("vision") is None
    return tokens.of("language")


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_text_tokens_of_every_sample_get_their_share(share):
    w = weights(share)
    assert torch.allclose((w * (IDS != IMAGE)).sum(1), torch.full((2,), share * 6))
    assert torch.allclose(w.mean(1), torch.ones(2))
    assert len(w[0, :4].unique()) == len(w[0, 4:].unique()) == 1


def test_every_token_counts_the_same_without_a_share_or_without_images():
    assert weights(None) is None
    assert weights(0.8, torch.tensor([[1, 2, 3]])) is None
    mixed = weights(0.8, torch.tensor([[IMAGE, 1, 2], [1, 2, 3]]))
    assert torch.equal(mixed[1], torch.ones(3))


def test_a_weight_counts_a_row_as_often():
    rows = torch.randn(4, 3)
    weighted, repeated = Moments.zeros(3), Moments.zeros(3)
    weighted.add(rows, torch.tensor([0.5, 0.5, 1.0, 2.0]))
    repeated.add(rows[[0, 1, 2, 2, 3, 3, 3, 3]])
    assert torch.allclose(weighted.mean, repeated.mean)
    assert torch.allclose(weighted.second, repeated.second)


def test_a_weight_counts_a_rows_size_as_often():
    rows = torch.randn(3, 2)
    scale = InputScale.zeros(2)
    scale.add(rows, torch.tensor([0.0, 1.0, 2.0]))
    assert torch.allclose(scale.mean, (rows[1].abs() + 2 * rows[2].abs()).double() / 3)
