"""Per-patch supervision of the vision tower; the heads are thrown away afterwards."""

from __future__ import annotations

import torch
from tiny_data.sample import HEADS, IGNORE
from torch import nn

# What needs fine detail is learnt last and counts most; what lies to each side
# follows from the rest.
_WEIGHTS = {"letter": 4.0, "shape": 3.0}
_SIDE_WEIGHT = 0.3


def _weight(head: str) -> float:
    return _SIDE_WEIGHT if " " in head else _WEIGHTS.get(head, 1.0)


class DenseHeads(nn.Module):
    """One linear classifier per column of the per-patch labels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, sum(HEADS.values()))

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """Returns the summed loss and the accuracy of every head."""
        logits = self.classify(self.norm(features)).float().split(list(HEADS.values()), -1)
        loss, accuracy = features.new_zeros(()), {}
        for index, name in enumerate(HEADS):
            target = labels[..., index]
            known = target != IGNORE
            if not known.any():
                continue
            picked, target = logits[index][known], target[known]
            each = nn.functional.cross_entropy(picked, target, reduction="none")
            # For letter and shape most patches are background: give what is
            # shown half of the weight.
            shown = target > 0 if name in ("letter", "shape") else torch.ones_like(target, dtype=torch.bool)
            for part in (shown, ~shown):
                if part.any():
                    loss = loss + 0.5 * _weight(name) * each[part].mean()
            if shown.any():
                hit = (picked.argmax(-1) == target)[shown]
                accuracy[name] = hit.float().mean().item()
        return loss, accuracy
