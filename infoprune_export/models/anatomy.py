"""The anatomy of a vision-language model: its towers, attention blocks and feed-forwards by role.

Everything else (statistics, plans, surgery, graphs, FLOPs) is written against these
descriptions and never against a class name. They hold names and sizes only, no weights
and no PyTorch, so a plan can carry them to a device that has neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

TowerName = Literal["vision", "language"]
TOWERS: tuple[TowerName, ...] = ("vision", "language")
ATTENTION_ROLES = ("q", "k", "v", "o")
FFN_ROLES = ("gate", "up", "down")

Positive = Annotated[int, Field(gt=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Linear(_Frozen):
    """One linear map `y = W x + b`: where it is, and its full size in the original."""

    path: str = Field(description="module path in the original model, such as model.language_model.layers.0.mlp.up_proj")
    d_in: Positive
    d_out: Positive
    bias: bool = False


class Attention(_Frozen):
    """One attention block. Query head h belongs to KV group `h // (heads // kv_groups)`."""

    path: str
    heads: Positive
    kv_groups: Positive
    head_dim: Positive
    q: Linear
    k: Linear
    v: Linear
    o: Linear

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.kv_groups


class FeedForward(_Frozen):
    """One feed-forward: `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` where gate is None."""

    path: str
    gate: Linear | None
    up: Linear
    down: Linear

    @property
    def matrices(self) -> dict[str, Linear]:
        """Role to linear map, in the order the data passes them."""
        return {role: m for role in FFN_ROLES if (m := getattr(self, role)) is not None}


class Layer(_Frozen):
    tower: TowerName
    index: int
    path: str
    attention: Attention
    ffn: FeedForward

    def linear(self, role: str) -> Linear:
        """The linear map with one of the roles q, k, v, o, gate, up, down."""
        return getattr(self.attention if role in ATTENTION_ROLES else self.ffn, role)


class Tower(_Frozen):
    """A stack of layers that the model really runs (layers past the feature layer are not listed)."""

    name: TowerName
    path: str
    hidden: Positive
    layers: tuple[Layer, ...]
    unused_layers: int = Field(0, description="layers in the checkpoint that are never run")


class VisionGeometry(_Frozen):
    """What the FLOP count needs of the vision side beside its layers."""

    image_size: Positive
    patch_size: Positive
    channels: Positive
    tokens: Positive = Field(description="sequence length inside the tower, class token included")
    image_tokens: Positive = Field(description="tokens that one image takes in the language model")


class Anatomy(_Frozen):
    """The whole model."""

    family: str = Field(description="name in infoprune_export.models.families")
    vision: Tower
    language: Tower
    geometry: VisionGeometry
    projector: tuple[Linear, ...]
    vocab_size: Positive
    embed_path: str
    head_path: str

    def tower(self, name: str) -> Tower:
        return getattr(self, name)

    def layers(self) -> Iterator[Layer]:
        """Every layer of both towers, vision first, in depth order."""
        yield from self.vision.layers
        yield from self.language.layers


def site(tower: str, index: int, role: str) -> str:
    """The key of one linear map everywhere a map is named: `language.3.down`."""
    return f"{tower}.{index}.{role}"
