"""Scores of attention heads, or of KV groups with all their query heads, by the information criterion.

The spectrum of a block is that of `G^(1/2) W C^(1/2)`: W its output projection, C the second moment of the
concatenated head outputs z, G that of the loss gradient at the block's output. The divergence of a unit is the
KS distance between that spectrum and the one without the unit's columns, in absolute units so that blocks of
all layers compare; its information is the effective rank of its own contribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infoprune_export.compress.information import effective_rank, ks_distance
from infoprune_export.compress.lowrank import GRADIENT_FLOOR
from infoprune_export.compress.spectra import WIDE, Root, product, spectrum_of_moment, symmetric_power, top_eigenvectors
from infoprune_export.compress.statistics import Statistics
from infoprune_export.models.anatomy import Attention, Layer, site


@dataclass(frozen=True)
class UnitScore:
    """What is known of one unit: a KV group with its query heads (one head where there is no grouping).

    Attributes:
        group: KV group.
        erank: `erank(O_u) / rank limit`, between 0 and 1.
        ks: KS distance of the block's spectrum without the unit, in units of (loss per sample)^(1/2).
        score: The union of both.
    """

    group: int
    erank: float
    ks: float
    score: float


def columns(attention: Attention, group: int) -> list[int]:
    """Columns of the output projection that belong to a KV group's query heads."""
    width = attention.heads_per_group * attention.head_dim
    return list(range(group * width, (group + 1) * width))


SUBSPACE = 512
"""Dimensions of a wide block's output, those with the most mass, in which the spectra without each unit are compared."""


def loss_root(stats: Statistics, key: str, width: int) -> Tensor:
    """A root of G at a block's output, `R R^T = G`, shape [width, width]."""
    identity = torch.eye(width, dtype=torch.float64)
    g = stats.gradients[key].outer / stats.samples
    return Root.of((1 - GRADIENT_FLOOR) * g + GRADIENT_FLOOR * torch.trace(g) / width * identity).matrix


def score_layer(layer: Layer, weight: Tensor, stats: Statistics, erank_weight: float, *, weighted: bool = True) -> list[UnitScore]:
    """Scores every unit of one attention block.

    Args:
        layer: The layer.
        weight: Its output projection W, shape [hidden, heads * head_dim].
        stats: Pass 1.
        erank_weight: a; the score is `ks * (1 - a + a * erank)`.
        weighted: Weight by the loss gradient; without, spectra are relative to the norm of the block's own output.
    """
    attention, key = layer.attention, site(layer.tower, layer.index, "o")
    w = weight.double()
    moments = stats.attention[key]
    # Where the projection has a bias, a unit's mean output can be folded into it: only the variation is information.
    c = moments.covariance if attention.o.bias else moments.second
    if weighted:
        a = loss_root(stats, key, attention.o.d_out).T @ w
    else:
        energy = float(torch.trace(w @ c @ w.T))
        a = w / energy**0.5 if energy > 0 else w
    outputs = product(a, c, a.T)
    whole, seen, beyond = spectrum_of_moment(outputs), a, 1.0
    if len(outputs) > WIDE:  # spectra with and without a unit are compared where most mass is, and the rest counts in proportion
        top = top_eigenvectors(outputs, SUBSPACE)
        seen, outputs, mass = top.T @ a, product(top.T, outputs, top), float(whole.sum())
        whole = spectrum_of_moment(outputs)
        beyond = mass / float(whole.sum()) if mass else 1.0
    mixed = seen @ c
    scores = []
    for group in range(attention.kv_groups):
        own = columns(attention, group)
        shared = mixed[:, own] @ seen[:, own].T
        without = outputs - shared - shared.T + seen[:, own] @ c[own][:, own] @ seen[:, own].T
        ks = beyond * ks_distance(whole, spectrum_of_moment(without), absolute=True)
        c_own = symmetric_power(c[own][:, own], 0.5)
        information = effective_rank(spectrum_of_moment(c_own @ a[:, own].T @ a[:, own] @ c_own)) / len(own)
        scores.append(UnitScore(group, information, ks, ks * (1 - erank_weight + erank_weight * information)))
    return scores


def fold_mean(weight: Tensor, bias: Tensor | None, mean: Tensor, kept: list[int]) -> dict[str, Tensor]:
    """The output projection on the kept columns, the mean output of what is dropped in its bias (FLAP, arXiv 2312.11983).

    Args:
        weight: W, shape [d_out, d_in].
        bias: Shape [d_out], or None; the result has one either way.
        mean: `E[z]`, shape [d_in], float64.
        kept: Kept columns, ascending.

    Returns:
        `weight` [d_out, |kept|] and `bias` [d_out]; float32.
    """
    lost = mean.clone()
    lost[kept] = 0
    folded = weight.double() @ lost
    return {"weight": weight[:, kept].float(), "bias": (folded if bias is None else bias.double() + folded).float()}


def refit_output(
    weight: Tensor, bias: Tensor | None, second: Tensor, mean: Tensor, kept: list[int], ridge: float = 1e-6
) -> dict[str, Tensor]:
    """The output projection on the kept columns that best reproduces the whole block's output.

    Least squares `W' = W C_:S C_SS^-1` (the compensation of method section 3.5); with a bias on centred moments,
    the mean of what is dropped folded in.

    Args:
        weight: W, shape [d_out, d_in].
        bias: Shape [d_out], or None.
        second: `E[z z^T]`, shape [d_in, d_in], float64.
        mean: `E[z]`, shape [d_in].
        kept: Kept columns S, ascending.
        ridge: Relative to the mean of the kept diagonal.

    Returns:
        `weight` [d_out, |S|] and, where the map has one, `bias` [d_out]; float32.
    """
    w = weight.double()
    c = second if bias is None else second - torch.outer(mean, mean)
    css = c[kept][:, kept]
    damping = ridge * float(css.diagonal().mean()) or 1.0  # without any data every solution is as good: keep the weights
    # Solved for the change against plain slicing, so that the ridge pulls towards the original weights and not to zero.
    rest = sorted(set(range(w.shape[1])) - set(kept))
    change = torch.linalg.solve(css + damping * torch.eye(len(kept), dtype=torch.float64), c[kept][:, rest] @ w[:, rest].T).T
    refitted = w[:, kept] + change
    out = {"weight": refitted.float()}
    if bias is not None:
        out["bias"] = (bias.double() + w @ mean - refitted @ mean[kept]).float()
    return out
