"""Gates on attention units: how they are drawn, and how they act on a network.

A unit is a KV group with its query heads (one head where there is no grouping). Its gate acts on its columns of the
output projection's input. Where the projection will be refitted after removal, the gated input is replaced by the best
linear prediction of the whole input from it, so that the network answers as it would after its refit.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infoprune_export.compress.statistics import Statistics
from infoprune_export.models.anatomy import Layer, site

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


def prediction(z: Tensor, moment: Tensor, ridge: float = 1e-6) -> Tensor:
    """The best linear prediction of a block's head outputs from what the gates let through.

    A gate is read as the probability that its unit stays. With D = diag(z), C the moment of the head outputs x and
    B its diagonal blocks of one unit each, the outputs that stay have the moment `D C D + (D - D D) B` and with x the
    moment `C D`, so least squares predict `x ~ P (D x)`, `P = (C D + r I) (D C D + (D - D D) B + r I)^-1`. With binary
    gates, W P is the output projection that `heads.refit_output` makes of the kept columns (up to the size of the
    ridge); with open ones it is W; a unit that is correlated with no other is merely multiplied by its gate.

    Args:
        z: Gates, shape [units].
        moment: C, `E[x x^T]` or the covariance, shape [units * width, units * width].
        ridge: r, relative to the mean of C's diagonal.

    Returns:
        `(P D)^T`, to be multiplied to row vectors x from the right, shape [units * width, units * width].
    """
    width = moment.shape[0] // z.shape[0]
    d = z.to(moment.dtype).repeat_interleave(width)
    unit = torch.arange(len(d), device=d.device) // width
    own = moment * (unit[:, None] == unit)
    identity = torch.eye(len(d), dtype=moment.dtype, device=d.device)
    damping = ridge * moment.diagonal().mean().clamp_min(1e-100) * identity
    gated = d[:, None] * moment * d + (d - d * d)[:, None] * own + damping
    return d[:, None] * torch.linalg.solve(gated, d[:, None] * moment + damping)


class Gates:
    """Hooks in front of a model's output projections, through which gates act on its units.

    Args:
        model: The original.
        layers: Whose units have gates: the units of the first layer first, then those of the next.
        stats: Pass 1, where the output projections will be refitted after removal; None where they will be sliced.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], stats: Statistics | None):
        self.count = 0
        self._now = threading.local()
        self._handles = []
        for layer in layers:
            own = slice(self.count, self.count + layer.attention.kv_groups)
            hook = self._gate(layer, own) if stats is None else self._predict(model, layer, own, stats)
            self._handles.append(model.get_submodule(layer.attention.o.path).register_forward_pre_hook(hook))
            self.count = own.stop

    def _gate(self, layer: Layer, own: slice) -> Callable:
        width = layer.attention.heads_per_group * layer.attention.head_dim

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if (z := self._current) is None:
                return None
            return (args[0] * z[own].to(args[0].dtype).repeat_interleave(width), *args[1:])

        return hook

    def _predict(self, model: nn.Module, layer: Layer, own: slice, stats: Statistics) -> Callable:
        moments = stats.attention[site(layer.tower, layer.index, "o")]
        biased = layer.attention.o.bias
        device = model.get_submodule(layer.attention.o.path).weight.device
        moment = (moments.covariance if biased else moments.second).to(device)
        mean = moments.mean.to(device) if biased else torch.zeros((), device=device)

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if (z := self._current) is None:
                return None
            # Computed again in the backward pass: what the solution keeps for it would be as large as the model.
            linear = checkpoint(prediction, z[own], moment, use_reentrant=False, preserve_rng_state=False)
            x, centre = args[0], mean.to(args[0].dtype)
            return ((x - centre) @ linear.to(x.dtype) + centre, *args[1:])

        return hook

    @property
    def _current(self) -> Tensor | None:
        return getattr(self._now, "z", None)

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
