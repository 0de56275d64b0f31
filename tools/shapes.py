"""LLaVA networks of given shapes with random weights, whole and compressed."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from infoprune_export.compress.decide import decide
from infoprune_export.compress.findings import look_at_all
from infoprune_export.compress.moments import Moments
from infoprune_export.compress.statistics import Statistics
from infoprune_export.compress.surgery import shape_as_planned
from infoprune_export.models.anatomy import Anatomy, site
from infoprune_export.models.families import find_anatomy
from infoprune_export.plans import Plan, Source
from infoprune_export.recipe import Criterion, Scope, Workload


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA with a CLIP tower and a Llama decoder.

    Attributes:
        vision_layers: Of the checkpoint, of which LLaVA never runs the last one: networks are made without it.
        prompt: Tokens of a prompt, those of the image included; where decoding begins.
        rank_multiple: Of the compressed feed-forwards' ranks.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_ffn: int
    image: int
    patch: int
    prompt: int
    rank_multiple: int


SHAPES = {
    "llava7b": Shape("llava7b", 4096, 32, 32, 11008, 32064, 1024, 24, 16, 4096, 336, 14, 640, 64),
    "small": Shape("small", 64, 2, 4, 128, 128, 32, 3, 4, 64, 28, 14, 40, 8),
}


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A network with random weights, made where it will run."""
    from transformers import CONFIG_MAPPING, LlavaConfig, LlavaForConditionalGeneration

    vision = CONFIG_MAPPING["clip_vision_model"](
        hidden_size=shape.vision_hidden,
        intermediate_size=shape.vision_ffn,
        num_hidden_layers=shape.vision_layers - 1,
        num_attention_heads=shape.vision_heads,
        image_size=shape.image,
        patch_size=shape.patch,
    )
    text = CONFIG_MAPPING["llama"](
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=shape.vocabulary - 1, vision_feature_layer=-1)
    with _made_as(device, dtype):
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


def compress(model: nn.Module, shape: Shape, flops: float, *, each: bool = False) -> Plan:
    """Gives a network the shapes of one that keeps a fraction of its FLOPs, in place: every layer and matrix keeps the same share.

    Which heads go, and what the factors hold, makes no difference to time and memory: both are random.

    Args:
        model: Changed.
        shape: Its sizes.
        flops: Fraction kept.
        each: Vision tower and language model keep that fraction each of their own, and not of the whole.
    """
    anatomy = find_anatomy(model)
    plan = _even_plan(model, anatomy, shape, flops, "vision" if each else "all")
    if each:
        language = _even_plan(model, anatomy, shape, flops, "language")
        plan.layers = [(language if x.tower == "language" else plan).decision(x.tower, x.layer) for x in plan.layers]
    weight = next(model.parameters())
    with _made_as(weight.device, weight.dtype):
        shape_as_planned(model, plan)
    model.requires_grad_(False)
    return plan


def _even_plan(model: nn.Module, anatomy: Anatomy, shape: Shape, flops: float, scope: Scope) -> Plan:
    criterion = Criterion(heads="random", weighting="none", allocation="uniform", compensate="none", rank_multiple=shape.rank_multiple)
    return decide(
        look_at_all(model, anatomy, _nothing_seen(anatomy), criterion),
        anatomy,
        source=Source(id=f"random weights, {shape.name}", sha256="0" * 64),
        criterion=criterion,
        workload=Workload(
            image_tokens=anatomy.geometry.image_tokens, text_tokens=max(1, shape.prompt - anatomy.geometry.image_tokens), new_tokens=16
        ),
        flops=flops,
        scope=scope,
    )


@contextmanager
def _made_as(device: torch.device, dtype: torch.dtype):
    """New tensors are on a device and of a type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _nothing_seen(anatomy: Anatomy) -> Statistics:
    """What a criterion that looks at nothing needs to have seen."""
    empty = Moments(torch.zeros(0), torch.zeros(0, 0), count=1)
    return Statistics(attention={site(x.tower, x.index, "o"): empty for x in anatomy.layers()}, samples=1, weighted=False)
