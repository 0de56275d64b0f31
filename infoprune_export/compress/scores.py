"""Head scores behind one interface: ours, and the published ones to compare with.

A rule gives one number per unit of an attention block (a KV group with its query heads; one head where there is no
grouping), the more the worthier. It says what pass 1 has to gather for it, and whether its authors compare units over
the whole model or within each layer. docs/method.md names every source and what differs here from its code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from infoprune_export.compress.heads import columns, score_layer
from infoprune_export.compress.statistics import Statistics
from infoprune_export.models.anatomy import ATTENTION_ROLES, TOWERS, Layer, site
from infoprune_export.recipe import HeadRankingName, HeadRuleName

Need = Literal["fisher", "gates", "weights"]
"""Beyond the moments of head outputs, which every pass 1 gathers: moments of loss gradients with drawn labels, or one
of the gradients of the reference answers (see `evidence.TaskGradients`)."""


@dataclass(frozen=True)
class Evidence:
    """What a rule may look at.

    Attributes:
        model: The original.
        stats: Pass 1, with what the rule needs.
        seed: For the rule that draws.
        erank_weight: a of our rule.
    """

    model: nn.Module
    stats: Statistics
    seed: int = 0
    erank_weight: float = 0.0

    def weight(self, layer: Layer, role: str) -> Tensor:
        """Weight of one projection, shape [d_out, d_in], float64."""
        return self.model.get_submodule(layer.linear(role).path).weight.detach().double().cpu()


@dataclass(frozen=True)
class HeadRule:
    """One way to score the units of a block.

    Attributes:
        score: Of a layer and the evidence; one number per KV group.
        needs: What pass 1 has to gather for it.
        ranking: How its authors compare units: over the whole model, or within each layer. Ours count mass per FLOP.
    """

    score: Callable[[Layer, Evidence], list[float]]
    needs: frozenset[Need] = frozenset()
    ranking: HeadRankingName = "global"


def _ours(weighted: bool) -> Callable[[Layer, Evidence], list[float]]:
    def score(layer: Layer, evidence: Evidence) -> list[float]:
        weight = evidence.weight(layer, "o")
        return [s.score for s in score_layer(layer, weight, evidence.stats, evidence.erank_weight, weighted=weighted)]

    return score


def _random(layer: Layer, evidence: Evidence) -> list[float]:
    draws = np.random.default_rng([evidence.seed, TOWERS.index(layer.tower), layer.index])
    return draws.random(layer.attention.kv_groups).tolist()


def _magnitude(layer: Layer, evidence: Evidence) -> list[float]:
    """l2 norm of all weights of the unit."""
    total = sum(_per_unit(layer, role, evidence.weight(layer, role).square()) for role in ATTENTION_ROLES)
    return torch.as_tensor(total).sqrt().tolist()


def _michel(layer: Layer, evidence: Evidence) -> list[float]:
    """`E |z_u^T dL/dz_u|`, divided by the l2 norm over the layer's units."""
    gates = evidence.stats.task.gates[site(layer.tower, layer.index, "o")] / evidence.stats.samples
    return (gates / gates.norm().clamp_min(torch.finfo(gates.dtype).tiny)).tolist()


def _taylor(layer: Layer, evidence: Evidence) -> list[float]:
    """`sum |w dL/dw|` over the unit's weights: the element-wise first-order variant."""
    weights = evidence.stats.task.weights
    total = sum(
        _per_unit(layer, role, (evidence.weight(layer, role) * weights[site(layer.tower, layer.index, role)].double()).abs())
        for role in ATTENTION_ROLES
    )
    return torch.as_tensor(total).tolist()


def _flap(layer: Layer, evidence: Evidence) -> list[float]:
    """`Var(x_j) |W_:,j|^2` of the output projection's inputs, standardised over the layer's, averaged over the unit's."""
    variance = evidence.stats.attention[site(layer.tower, layer.index, "o")].covariance.diagonal().clamp_min(0)
    fluctuation = variance * evidence.weight(layer, "o").square().sum(0)
    standard = (fluctuation - fluctuation.mean()) / fluctuation.std().clamp_min(torch.finfo(fluctuation.dtype).tiny)
    return standard.reshape(layer.attention.kv_groups, -1).mean(1).tolist()


def _wanda_sp(layer: Layer, evidence: Evidence) -> list[float]:
    """`sum_j mean_i |W_ij| |x_j|` over the unit's columns of the output projection."""
    moments = evidence.stats.attention[site(layer.tower, layer.index, "o")]
    norms = (moments.second.diagonal().clamp_min(0) * moments.count / evidence.stats.samples).sqrt()
    return (_per_unit(layer, "o", evidence.weight(layer, "o").abs() * norms) / layer.attention.o.d_out).tolist()


def _per_unit(layer: Layer, role: str, values: Tensor) -> Tensor:
    """Sums of something that every weight of a projection has over each unit's rows (columns of o), shape [kv_groups]."""
    a = layer.attention
    if role == "o":
        return torch.stack([values[:, columns(a, group)].sum() for group in range(a.kv_groups)])
    return values.reshape(a.kv_groups, -1).sum(1)


HEAD_RULES: dict[HeadRuleName, HeadRule] = {
    "ks": HeadRule(_ours(weighted=True), frozenset({"fisher"}), ranking="flops"),
    "ks-activation": HeadRule(_ours(weighted=False), ranking="flops"),
    "random": HeadRule(_random, ranking="layer"),
    "magnitude": HeadRule(_magnitude, ranking="layer"),
    "michel": HeadRule(_michel, frozenset({"gates"})),
    "taylor": HeadRule(_taylor, frozenset({"weights"}), ranking="layer"),
    "flap": HeadRule(_flap),
    "wanda-sp": HeadRule(_wanda_sp, ranking="layer"),
}
