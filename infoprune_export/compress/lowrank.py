"""A feed-forward matrix as a low-rank pair, by two-sided weighted SVD on the smaller side.

Minimises `|G^(1/2) (W - W') C^(1/2)|_F` (our reading of loss-weighted approximation; with G = I it is the
whitened SVD of SVD-LLM, arXiv 2403.07378). Only the smaller side's moments are ever needed:

- `d_out > d_in`: V = top eigenvectors of `C^(1/2) M C^(1/2)`, `M = W^T G W = E[(W^T g)(W^T g)^T]`;
  `W' = (W C^(1/2) V) (V^T C^(-1/2))`.
- `d_out <= d_in`: U = top eigenvectors of `G^(1/2) Y G^(1/2)`, `Y = W C W^T = E[y y^T]`;
  `W' = (G^(-1/2) U) (U^T G^(1/2) W)`.

Where the map has a bias, moments are centred and the mean of what is dropped goes into the bias.

The published rules are the same problem with other weights: ASVD puts `diag(mean|x|^(1/2))` in the place of
`C^(1/2)`, plain SVD nothing; both leave the bias as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infoprune_export.compress.moments import InputScale, Moments
from infoprune_export.compress.spectra import Root, gram, product, spectrum_of_moment, top_eigenvectors
from infoprune_export.compress.statistics import Statistics, input_side
from infoprune_export.models.anatomy import Linear
from infoprune_export.recipe import WeightingName

GRADIENT_FLOOR = 0.1
"""Share of an isotropic gradient mixed into G: with few samples G has directions that it never saw."""


class LowRankLinear(nn.Module):
    """`y = second(first(x))`: a linear map of rank at most r, as two maps.

    Args:
        d_in: Input width.
        d_out: Output width.
        rank: Width in between.
        bias: Whether the second map has a bias.
    """

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool, dtype: torch.dtype | None = None):
        super().__init__()
        self.first = nn.Linear(d_in, rank, bias=False, dtype=dtype)
        self.second = nn.Linear(rank, d_out, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@dataclass(frozen=True)
class Weighting:
    """The two weights of one map's approximation, both on its smaller side, in float64.

    Attributes:
        data: C or Y, the moment of inputs or outputs, shape [n, n].
        loss: M or G, the moment of gradients on the same side, shape [n, n]; its scale is the loss per sample.
        mean: Of the inputs, or of the outputs without bias, to be folded into the bias, shape [n].
    """

    data: Tensor
    loss: Tensor
    mean: Tensor


Observed = Moments | InputScale | None
"""What a rule has to see of a map's data; None where it looks at the weights alone."""


def nothing_seen(rule: WeightingName, linear: Linear) -> Observed:
    """An empty accumulator of what a rule has to see."""
    if rule == "none":
        return None
    return InputScale.zeros(linear.d_in) if rule == "asvd" else Moments.zeros(min(linear.d_in, linear.d_out))


def seen_before(rule: WeightingName, key: str, stats: Statistics) -> Observed:
    """What pass 1 has for a rule of the map at a site; None where it was not asked for."""
    return {"asvd": stats.scales, "none": {}}.get(rule, stats.ffn).get(key)


def weighting(rule: WeightingName, key: str, linear: Linear, weight: Tensor, seen: Observed, stats: Statistics) -> Weighting:
    """Puts together the weights of one map.

    Args:
        rule: `loss`, `activation`, `asvd` or `none`.
        key: Site of the map.
        linear: Its sizes.
        weight: W, shape [d_out, d_in], float64.
        seen: From pass 1 or from the compressed prefix, as `nothing_seen` made it.
        stats: Pass 1, for the gradients.
    """
    if isinstance(seen, Moments):
        data, mean = (seen.covariance, seen.mean) if linear.bias else (seen.second, seen.mean)
    else:
        scale = torch.ones(linear.d_in, dtype=torch.float64) if seen is None else _asvd_scale(seen)
        data = torch.diag(scale**2) if input_side(linear) else (weight * scale**2) @ weight.T
        mean = torch.zeros(len(data), dtype=torch.float64)
    if rule == "loss":
        return Weighting(data, loss_moment(key, linear, weight, stats), mean)
    # Relative error of the map's own output: the only scale there is without the loss.
    every_output = _every_output(linear, weight)
    energy = float(torch.trace(every_output @ data))
    return Weighting(data, every_output / energy if energy > 0 else every_output, mean)


def loss_moment(key: str, linear: Linear, weight: Tensor, stats: Statistics) -> Tensor:
    """G or M of one map, per sample, with its floor, shape [n, n], n the smaller side.

    Both passes ask for it and it takes a product of whole matrices: it is made once, and kept in `stats` in the place of the
    gradients that it is made of.
    """
    if key not in stats.losses:
        gradients = stats.gradients.pop(key).outer / stats.samples
        energy = stats.gradient_energy.pop(key) / stats.samples
        stats.losses[key] = (1 - GRADIENT_FLOOR) * gradients + GRADIENT_FLOOR * energy * _every_output(linear, weight)
    return stats.losses[key]


def _every_output(linear: Linear, weight: Tensor) -> Tensor:
    """The loss weight where all outputs of a map weigh the same, seen from its smaller side: `W^T W`, or the identity."""
    if not input_side(linear):
        return torch.eye(linear.d_out, dtype=torch.float64)
    return gram(weight)


def _asvd_scale(seen: InputScale, alpha: float = 0.5) -> Tensor:
    """`mean|x|^alpha`; channels that were never used count as the weakest one that was, so that they can be undone."""
    scale = seen.mean**alpha
    used = scale[scale > 0]
    return scale.clamp_min(float(used.min())) if len(used) else torch.ones_like(scale)


def spectrum(linear: Linear, w: Weighting) -> Tensor:
    """Singular values of `G^(1/2) W C^(1/2)`, descending, in units of (loss per sample)^(1/2)."""
    return spectrum_of_moment(Root.of(w.data).around(w.loss))


def factorise(linear: Linear, weight: Tensor, bias: Tensor | None, w: Weighting, rank: int) -> dict[str, Tensor]:
    """The best pair of a given rank.

    Args:
        linear: Sizes of the map.
        weight: W, shape [d_out, d_in].
        bias: Its bias, shape [d_out].
        w: Weights from `weighting`.
        rank: r.

    Returns:
        `first` [r, d_in], `second` [d_out, r] and, where the map has one, `bias` [d_out]; float32.
    """
    if input_side(linear):
        root = Root.of(w.data)
        top = top_eigenvectors(root.around(w.loss), rank)
        second, first = product(weight, product(root.matrix, top)), root.undo(top.T)
        mean_kept = second @ (first @ w.mean)
    else:
        # Here G is inverted, never the data: directions without data are free, directions without loss have the floor.
        root = Root.of(w.loss)
        top = top_eigenvectors(root.around(w.data), rank)
        kept = product(top.T, root.matrix.T)
        second, first = root.undo(top.T).T, product(kept, weight)
        mean_kept = second @ (kept @ w.mean)
    balance = (first.norm(dim=1) / second.norm(dim=0).clamp_min(1e-30)).clamp_min(1e-30).sqrt()
    pair = {"first": (first / balance[:, None]).float(), "second": (second * balance).float()}
    if bias is not None:
        mean = weight.double() @ w.mean if input_side(linear) else w.mean
        pair["bias"] = (bias.double() + (mean - mean_kept)).float()
    return pair
