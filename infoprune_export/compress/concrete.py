"""Gates on attention units: how they are drawn, and how they act on a network.

A unit is a KV group with its query heads (one head where there is no grouping). Its gate multiplies its columns of the
output projection's input.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from infoprune_export.models.anatomy import Layer

BETA = 0.33
STRETCH = (-0.1, 1.1)
"""(gamma, zeta): what the concrete variable is stretched to before it is clipped to [0, 1]."""


def open_probability(log_a: Tensor) -> Tensor:
    """`P(z > 0) = sigmoid(log_a - beta ln(-gamma / zeta))`; shape as given."""
    return torch.sigmoid(log_a - BETA * math.log(-STRETCH[0] / STRETCH[1]))


def draw(log_a: Tensor, u: Tensor) -> Tensor:
    """Hard-concrete gates from uniform numbers (Louizos, Welling & Kingma, arXiv 1712.01312).

    Args:
        log_a: Location, shape [units].
        u: In the open interval (0, 1), shape [units].

    Returns:
        `clip(s (zeta - gamma) + gamma, 0, 1)`, `s = sigmoid((ln u - ln(1 - u) + log_a) / beta)`; shape [units].
    """
    return _stretched(torch.sigmoid((torch.logit(u) + log_a) / BETA))


def settled(log_a: Tensor) -> Tensor:
    """Gates without noise, as at evaluation: `clip(sigmoid(log_a) (zeta - gamma) + gamma, 0, 1)`; shape as given."""
    return _stretched(torch.sigmoid(log_a))


def _stretched(s: Tensor) -> Tensor:
    return (s * (STRETCH[1] - STRETCH[0]) + STRETCH[0]).clamp(0, 1)


class Gates:
    """Hooks in front of a model's output projections, through which gates act on its units.

    Args:
        model: The original.
        layers: Whose units have gates: the units of the first layer first, then those of the next.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]):
        self.count = 0
        self._now = threading.local()
        self._handles = []
        for layer in layers:
            own = slice(self.count, self.count + layer.attention.kv_groups)
            projection = model.get_submodule(layer.attention.o.path)
            self._handles.append(projection.register_forward_pre_hook(self._hook(layer, own)))
            self.count = own.stop

    def _hook(self, layer: Layer, own: slice) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        width = layer.attention.heads_per_group * layer.attention.head_dim

        def gate(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if (z := getattr(self._now, "z", None)) is None:
                return None
            return (args[0] * z[own].to(args[0].dtype).repeat_interleave(width), *args[1:])

        return gate

    @contextmanager
    def set(self, z: Tensor) -> Iterator[None]:
        """Gates, shape [count], for this thread's forward passes inside the context; outside all are open."""
        self._now.z = z
        try:
            yield
        finally:
            self._now.z = None

    def close(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()
