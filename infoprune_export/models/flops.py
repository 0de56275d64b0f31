"""FLOPs of a model from its anatomy, a workload and a plan. No weights, no PyTorch.

The convention: one multiply-accumulate is 2 FLOPs; matrix products and convolutions only; attention
scores in full (not halved for causality); logits at the last position; the first new token comes out
of the prefill, so a workload of n new tokens has n - 1 decode steps; layers that the model never runs
are not counted. `graph.count` counts the exported graphs by the same rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from infoprune_export.models.anatomy import Anatomy, Layer, Linear

if TYPE_CHECKING:
    from infoprune_export.plans import LayerPlan, Plan
    from infoprune_export.recipe import Workload


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one request (all of its batch)."""

    vision: int
    projector: int
    prefill: int
    decode: int

    @property
    def total(self) -> int:
        return self.vision + self.projector + self.prefill + self.decode

    def over(self, scope: str) -> int:
        """The part a budget is over: `all`, `vision` (the tower alone) or `language` (prefill + decode)."""
        return {"all": self.total, "vision": self.vision, "language": self.prefill + self.decode}[scope]

    def parts(self) -> dict[str, int]:
        return {"vision": self.vision, "projector": self.projector, "prefill": self.prefill, "decode": self.decode}


DENOMINATORS = {
    "all": "vision tower + projector + language model, prefill and decode",
    "vision": "vision tower",
    "language": "language model, prefill and decode",
}


@dataclass(frozen=True)
class Passes:
    """How often a tower's weights and score products are used in one request.

    Attributes:
        tokens: Positions that pass every linear map.
        pairs: Query-key pairs that every head scores.
    """

    tokens: int
    pairs: int


def passes(anatomy: Anatomy, workload: Workload) -> dict[str, Passes]:
    """Passes of `vision`, `prefill` and `decode` for one request."""
    vision_tokens, prompt, steps = anatomy.geometry.tokens, workload.prompt_tokens, workload.new_tokens - 1
    images = workload.batch * workload.images
    return {
        "vision": Passes(images * vision_tokens, images * vision_tokens**2),
        "prefill": Passes(workload.batch * prompt, workload.batch * prompt**2),
        # Step i attends to the prompt, the tokens made so far and itself: prompt + i keys.
        "decode": Passes(workload.batch * steps, workload.batch * (steps * prompt + steps * (steps + 1) // 2)),
    }


def tower_passes(anatomy: Anatomy, workload: Workload) -> dict[str, Passes]:
    """Passes of each tower over the whole request."""
    p = passes(anatomy, workload)
    both = Passes(p["prefill"].tokens + p["decode"].tokens, p["prefill"].pairs + p["decode"].pairs)
    return {"vision": p["vision"], "language": both}


def linear_macs(linear: Linear, rank: int | None = None) -> int:
    """Multiply-accumulates of one position through a map, dense or as a low-rank pair."""
    return linear.d_in * linear.d_out if rank is None else rank * (linear.d_in + linear.d_out)


def attention_flops(layer: Layer, heads: int, kv_groups: int, p: Passes) -> int:
    a = layer.attention
    per_token = a.head_dim * (heads * (a.q.d_in + a.o.d_out) + 2 * kv_groups * a.k.d_in)
    return 2 * p.tokens * per_token + 4 * p.pairs * heads * a.head_dim


def ffn_flops(layer: Layer, ranks: dict[str, int | None], p: Passes) -> int:
    return 2 * p.tokens * sum(linear_macs(m, ranks.get(role)) for role, m in layer.ffn.matrices.items())


def layer_flops(layer: Layer, decision: LayerPlan | None, p: Passes) -> int:
    """FLOPs of one layer, whole (decision None) or as planned."""
    if decision is None:
        return attention_flops(layer, layer.attention.heads, layer.attention.kv_groups, p) + ffn_flops(layer, {}, p)
    return attention_flops(layer, len(decision.heads), len(decision.kv_groups), p) + ffn_flops(layer, decision.ranks, p)


def count(anatomy: Anatomy, workload: Workload, plan: Plan | None = None) -> FlopCount:
    """FLOPs of one request.

    Args:
        anatomy: Of the original model.
        workload: Its batch, images and tokens; `image_tokens` must be the model's where images > 0.
        plan: What is kept; the original when None.
    """
    p = passes(anatomy, workload)
    geometry = anatomy.geometry
    images = workload.batch * workload.images
    patches = (geometry.image_size // geometry.patch_size) ** 2

    def towers(layers: tuple[Layer, ...], part: str) -> int:
        return sum(layer_flops(x, plan.decision(x.tower, x.index) if plan else None, p[part]) for x in layers)

    logits = 2 * anatomy.language.hidden * anatomy.vocab_size
    steps = workload.batch * (workload.new_tokens - 1)
    return FlopCount(
        vision=towers(anatomy.vision.layers, "vision")
        + 2 * images * patches * geometry.channels * geometry.patch_size**2 * anatomy.vision.hidden,
        projector=2 * images * geometry.image_tokens * sum(linear_macs(x) for x in anatomy.projector),
        prefill=towers(anatomy.language.layers, "prefill") + workload.batch * logits,
        decode=towers(anatomy.language.layers, "decode") + steps * logits,
    )
