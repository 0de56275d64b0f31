"""Pass 2: the factors, layer by layer in depth order, each on what the compressed prefix really gives it.

Within a layer: moments of the head outputs with all heads there -> the output projection refitted on the kept
ones; heads removed; moments of the feed-forward's input -> gate and up; those put in place; moments of the
narrowing matrix's output -> down. The hidden states of the calibration batches travel from layer to layer, so
every layer runs a fixed number of times however deep the model is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from infoprune_export.compress.heads import refit_output
from infoprune_export.compress.lowrank import factorise, weighting
from infoprune_export.compress.statistics import Batch, Moments, Statistics, input_side, without_bias
from infoprune_export.compress.surgery import dense, head_rows, low_rank, prune_heads
from infoprune_export.models.anatomy import Layer, Tower, site
from infoprune_export.plans import Factors, LayerPlan, Plan


@torch.no_grad()
def make_factors(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    stats: Statistics,
    *,
    progress: Callable[[str], None] | None = None,
) -> Factors:
    """Makes the factors of a plan and applies plan and factors to the model on the way.

    Args:
        model: The original; compressed in place.
        plan: What to keep.
        batches: Calibration batches.
        stats: Pass 1 on the original, for the loss gradients.
        progress: Called with a layer's name when it is done.

    Returns:
        The contents of factors.safetensors.
    """
    factors: dict[str, Tensor] = {}
    for tower in (plan.anatomy.vision, plan.anatomy.language):
        todo = [x for x in tower.layers if _is_cut(x, plan.decision(x.tower, x.index))]
        if not todo:
            continue
        prefix = _Prefix(model, tower, batches)
        for layer in tower.layers[: todo[-1].index + 1]:
            if layer in todo:
                factors |= _cut_layer(model, layer, plan, prefix, stats)
            prefix.advance(model.get_submodule(layer.path))
            if progress:
                progress(f"{layer.tower} {layer.index}")
    return {name: tensor.contiguous().numpy() for name, tensor in sorted(factors.items())}


def _is_cut(layer: Layer, decision: LayerPlan) -> bool:
    return len(decision.heads) < layer.attention.heads or any(r is not None for r in decision.ranks.values())


def _cut_layer(model: nn.Module, layer: Layer, plan: Plan, prefix: _Prefix, stats: Statistics) -> dict[str, Tensor]:
    decision = plan.decision(layer.tower, layer.index)
    factors: dict[str, Tensor] = {}
    attention = layer.attention
    if len(decision.heads) < attention.heads:
        projection = model.get_submodule(attention.o.path)
        if plan.criterion.compensate:
            moments = prefix.moments(model, layer, attention.o.path, attention.o.d_in, lambda m, x, y: x)
            kept = head_rows(attention, decision.heads)
            refit = refit_output(projection.weight, projection.bias, moments.second, moments.mean, kept)
            key = site(layer.tower, layer.index, "o")
            factors |= {f"{key}.{name}": t for name, t in refit.items()}
        prune_heads(model, attention, decision.heads, decision.kv_groups)
        if plan.criterion.compensate:
            model.set_submodule(attention.o.path, dense(refit["weight"], refit.get("bias")))
    for role, linear in layer.ffn.matrices.items():
        if (rank := decision.ranks[role]) is None:
            continue
        key, module = site(layer.tower, layer.index, role), model.get_submodule(linear.path)
        moments = prefix.moments(
            model,
            layer,
            linear.path,
            min(linear.d_in, linear.d_out),
            (lambda m, x, y: x) if input_side(linear) else (lambda m, x, y: without_bias(m, y)),
        )
        w = weighting(key, linear, module.weight.double(), moments, stats)
        pair = factorise(linear, module.weight, module.bias, w, moments.mean, rank)
        factors |= {f"{key}.{name}": t for name, t in pair.items()}
        model.set_submodule(linear.path, low_rank(pair["first"], pair["second"], pair.get("bias")))
    return factors


class _Prefix:
    """The calibration batches' hidden states in front of one layer of a tower, as the compressed prefix gives them."""

    def __init__(self, model: nn.Module, tower: Tower, batches: Sequence[Batch]):
        self.calls: list[tuple[Tensor, tuple, dict[str, Any]]] = []
        first = model.get_submodule(tower.layers[0].path)
        handle = first.register_forward_pre_hook(self._capture, with_kwargs=True)
        try:
            for batch in batches:
                try:
                    model(**batch.inputs, use_cache=False, logits_to_keep=1)
                except _Captured:
                    continue
        finally:
            handle.remove()

    def _capture(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        self.calls.append((hidden.detach(), args[1:], kwargs))
        raise _Captured

    def advance(self, layer: nn.Module) -> None:
        """Passes the hidden states through a layer."""
        self.calls = [(_hidden(layer(x, *args, **kwargs)), args, kwargs) for x, args, kwargs in self.calls]

    def moments(self, model: nn.Module, layer: Layer, path: str, n: int, pick: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Moments:
        """Moments of what `pick` takes of the call of one map inside a layer."""
        moments = Moments.zeros(n)
        handle = model.get_submodule(path).register_forward_hook(lambda m, args, y: moments.add(pick(m, args[0], y)))
        try:
            module = model.get_submodule(layer.path)
            for x, args, kwargs in self.calls:
                module(x, *args, **kwargs)
        finally:
            handle.remove()
        return moments


class _Captured(Exception):
    """Ends a forward pass whose first layer's input has been taken."""


def _hidden(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
