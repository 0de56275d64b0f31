"""Running sums over streams of vectors, in float64: their size does not depend on how many there are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infoprune_export.models.anatomy import TowerName


@dataclass
class Moments:
    """Running first and second moments of a stream of vectors."""

    total: Tensor
    outer: Tensor
    count: int = 0

    @classmethod
    def zeros(cls, n: int) -> Moments:
        return cls(torch.zeros(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64))

    def add(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Adds vectors, shape [..., n], each counted as often as its weight says, shape [...], on average once."""
        rows = rows.detach().reshape(-1, rows.shape[-1]).float()
        weighted = rows if weights is None else rows * weights.reshape(-1, 1)
        self.total += weighted.double().sum(0).cpu()
        self.outer += (weighted.T @ rows).double().cpu()
        self.count += rows.shape[0]

    @property
    def mean(self) -> Tensor:
        return self.total / max(self.count, 1)

    @property
    def second(self) -> Tensor:
        """`E[x x^T]`."""
        return self.outer / max(self.count, 1)

    @property
    def covariance(self) -> Tensor:
        """`E[x x^T] - E[x] E[x]^T`."""
        return self.second - torch.outer(self.mean, self.mean)


@dataclass
class InputScale:
    """Running mean of `|x|` of every channel of a stream of vectors (what ASVD asks for)."""

    total: Tensor
    count: int = 0

    @classmethod
    def zeros(cls, n: int) -> InputScale:
        return cls(torch.zeros(n, dtype=torch.float64))

    def add(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Adds vectors, shape [..., n], weighted as in `Moments.add`."""
        rows = rows.detach().reshape(-1, rows.shape[-1])
        weighted = rows if weights is None else rows * weights.reshape(-1, 1)
        self.total += weighted.double().abs().sum(0).cpu()
        self.count += rows.shape[0]

    @property
    def mean(self) -> Tensor:
        return self.total / max(self.count, 1)


@dataclass
class TokenWeights:
    """How much each token of the batch under way counts in the language model's moments.

    Most tokens are image tokens, but the loss is felt on the text: its gradient at a text token was 40 to 2,000
    times that at an image token in the network we measured. Where a share is given, the text tokens of every sample
    together weigh that much and its image tokens the rest; without one every token counts the same.

    Attributes:
        share: Of the text tokens, between 0 and 1.
        image_token: Id that stands for an image token in the input.
        now: Weights of the batch under way, 1 on average, shape [batch, sequence].
    """

    share: float | None
    image_token: int
    now: Tensor | None = None

    def start(self, ids: Tensor) -> None:
        """Begins a batch of token ids, shape [batch, sequence]."""
        image = ids == self.image_token
        n = image.sum(1, keepdim=True)
        if self.share is None or not n.any():
            self.now = None
            return
        text = self.share / (ids.shape[1] - n).clamp_min(1)
        self.now = torch.where(n == 0, 1.0, torch.where(image, (1 - self.share) / n.clamp_min(1), text) * ids.shape[1])

    def of(self, tower: TowerName) -> Tensor | None:
        """The weights for a site of a tower; a vision tower sees nothing but image."""
        return self.now if tower == "language" else None
