"""One attention block with weights of a test's own, and statistics of outputs that it makes up.

Imported by path through conftest, like `networks`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from infoprune_export.compress.moments import Moments
from infoprune_export.compress.statistics import Statistics
from infoprune_export.models.anatomy import Attention, FeedForward, Layer, Linear

SITE = "language.0.o"


def layer_of(heads: int = 4, groups: int = 4, head_dim: int = 3, hidden: int = 10, bias: bool = False) -> Layer:
    def linear(path: str, d_out: int, d_in: int) -> Linear:
        return Linear(path=path, d_out=d_out, d_in=d_in, bias=bias)

    attention = Attention(
        path="a",
        heads=heads,
        kv_groups=groups,
        head_dim=head_dim,
        q=linear("q", heads * head_dim, hidden),
        k=linear("k", groups * head_dim, hidden),
        v=linear("v", groups * head_dim, hidden),
        o=linear("o", hidden, heads * head_dim),
    )
    ffn = FeedForward(path="f", gate=None, up=linear("up", 2 * hidden, hidden), down=linear("down", hidden, 2 * hidden))
    return Layer(tower="language", index=0, path="", attention=attention, ffn=ffn)


def module_of(layer: Layer, seed: int = 0) -> nn.Module:
    """A module that holds the block's projections under their paths."""
    torch.manual_seed(seed)
    module = nn.Module()
    for role in ("q", "k", "v", "o"):
        linear = layer.linear(role)
        module.add_module(linear.path, nn.Linear(linear.d_in, linear.d_out, bias=linear.bias))
    return module.requires_grad_(False)


def statistics_of(z: Tensor, gradient: Tensor) -> Statistics:
    """What pass 1 would have found: head outputs z [positions, heads * head_dim], gradients [positions, hidden]."""
    stats = Statistics(samples=len(gradient))
    stats.attention[SITE], stats.gradients[SITE] = Moments.zeros(z.shape[1]), Moments.zeros(gradient.shape[1])
    stats.attention[SITE].add(z)
    stats.gradients[SITE].add(gradient)
    return stats
