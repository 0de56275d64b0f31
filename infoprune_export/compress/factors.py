"""Pass 2: the factors, layer by layer in depth order, each on what the compressed prefix really gives it.

Within a layer: moments of the head outputs with all heads there -> the output projection refitted on the kept
ones; heads removed; moments of the feed-forward's input -> gate and up; those put in place; moments of the
narrowing matrix's output -> down. The hidden states of the calibration batches travel from layer to layer, so
every layer runs a fixed number of times however deep the model is.

With `criterion.recalibrate: false` the moments are those of pass 1, on the original, and nothing runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infoprune_export.compress.heads import fold_mean, refit_output
from infoprune_export.compress.lowrank import Observed, factorise, nothing_seen, seen_before, weighting
from infoprune_export.compress.moments import Moments, TokenWeights
from infoprune_export.compress.statistics import Batch, Statistics, at_input, observer
from infoprune_export.compress.surgery import dense, head_rows, low_rank, prune_heads
from infoprune_export.compress.walk import Reached, calls_of
from infoprune_export.models.anatomy import Layer, Tower, site
from infoprune_export.plans import Factors, Plan
from infoprune_export.recipe import WeightingName


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
        if not (walked := layers_walked(plan, tower)):
            continue
        tokens = TokenWeights(plan.criterion.text_share, model.config.image_token_id)
        source = _Prefix(model, tower, batches, tokens) if plan.criterion.recalibrate else _OneShot(stats)
        for layer in walked:
            if plan.decision(layer.tower, layer.index).cuts(layer):
                factors |= _cut_layer(model, layer, plan, source, stats)
            source.advance(model.get_submodule(layer.path))
            if progress:
                progress(f"{layer.tower} {layer.index}")
    return {name: tensor.contiguous().numpy() for name, tensor in sorted(factors.items())}


def layers_walked(plan: Plan, tower: Tower) -> list[Layer]:
    """The layers of a tower up to the last that is cut, in depth order."""
    cut = [x.index for x in tower.layers if plan.decision(x.tower, x.index).cuts(x)]
    return list(tower.layers[: cut[-1] + 1]) if cut else []


def _cut_layer(model: nn.Module, layer: Layer, plan: Plan, source: _Prefix | _OneShot, stats: Statistics) -> dict[str, Tensor]:
    decision, rule = plan.decision(layer.tower, layer.index), plan.criterion.weighting
    factors: dict[str, Tensor] = {}
    if len(decision.heads) < layer.attention.heads:
        compensated = _compensate(model, layer, plan, source)
        key, path = site(layer.tower, layer.index, "o"), layer.attention.o.path
        factors |= {f"{key}.{name}": t for name, t in compensated.items()}
        prune_heads(model, layer.attention, decision.heads, decision.kv_groups)
        if compensated:
            new = dense(compensated["weight"], compensated.get("bias"))
            model.set_submodule(path, new.to(model.get_submodule(path).weight.device))
    shared: Observed = None
    for role, linear in layer.ffn.matrices.items():
        if (rank := decision.ranks[role]) is None:
            continue
        key, module = site(layer.tower, layer.index, role), model.get_submodule(linear.path)
        seen = shared if role == "up" and shared is not None else source.feed_forward(model, layer, role, rule)
        if role == "gate" and at_input(linear, seen):
            shared = seen  # up reads the same input: the layer need not run again
        weight, bias = _on_cpu(module)
        w = weighting(rule, key, linear, weight.double(), seen, stats)
        pair = factorise(linear, weight, bias, w, rank)
        factors |= {f"{key}.{name}": t for name, t in pair.items()}
        model.set_submodule(linear.path, low_rank(pair["first"], pair["second"], pair.get("bias")).to(module.weight.device))
    return factors


def _on_cpu(module: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """A map's weight and bias where the moments are: decompositions in float64 run on the CPU."""
    return module.weight.cpu(), None if module.bias is None else module.bias.cpu()


def _compensate(model: nn.Module, layer: Layer, plan: Plan, source: _Prefix | _OneShot) -> dict[str, Tensor]:
    """What the output projection becomes when heads go; nothing where it is only sliced."""
    if plan.criterion.compensate == "none":
        return {}
    weight, bias = _on_cpu(model.get_submodule(layer.attention.o.path))
    kept = head_rows(layer.attention, plan.decision(layer.tower, layer.index).heads)
    moments = source.attention(model, layer)
    if plan.criterion.compensate == "bias":
        return fold_mean(weight, bias, moments.mean, kept)
    return refit_output(weight, bias, moments.second, moments.mean, kept)


@dataclass(frozen=True)
class _OneShot:
    """What pass 1 saw of the original."""

    stats: Statistics

    def attention(self, model: nn.Module, layer: Layer) -> Moments:
        return self.stats.attention[site(layer.tower, layer.index, "o")]

    def feed_forward(self, model: nn.Module, layer: Layer, role: str, rule: WeightingName) -> Observed:
        return seen_before(rule, site(layer.tower, layer.index, role), self.stats)

    def advance(self, layer: nn.Module) -> None:
        pass


class _Prefix:
    """The calibration batches' hidden states in front of one layer of a tower, as the compressed prefix gives them."""

    def __init__(self, model: nn.Module, tower: Tower, batches: Sequence[Batch], tokens: TokenWeights):
        self.tokens = tokens
        self.calls = [found for batch in batches for found in calls_of(model, tower, batch)]

    def attention(self, model: nn.Module, layer: Layer) -> Moments:
        """Moments of a layer's head outputs, which are its output projection's inputs."""
        o, moments = layer.attention.o, Moments.zeros(layer.attention.o.d_in)
        self._watch(model, layer, o.path, lambda module, args, y: moments.add(args[0], self.tokens.of(layer.tower)))
        return moments

    def feed_forward(self, model: nn.Module, layer: Layer, role: str, rule: WeightingName) -> Observed:
        """What a rule has to see of one feed-forward matrix."""
        linear = layer.ffn.matrices[role]
        if (seen := nothing_seen(rule, linear)) is not None:
            self._watch(model, layer, linear.path, observer(linear, seen, layer.tower, self.tokens))
        return seen

    def advance(self, layer: nn.Module) -> None:
        """Passes the hidden states through a layer."""
        self.calls = [(call, call.through(layer, hidden)) for call, hidden in self.calls]

    def _watch(self, model: nn.Module, layer: Layer, path: str, hook: Callable[[nn.Module, tuple, Tensor], None]) -> None:
        """Runs a layer as far as one map inside it, with a forward hook there."""

        def take(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            hook(module, args, output)
            raise Reached  # what the layer does after this map is not needed here

        handle = model.get_submodule(path).register_forward_hook(take)
        try:
            module = model.get_submodule(layer.path)
            for call, hidden in self.calls:
                self.tokens.start(call.batch.inputs["input_ids"])
                with suppress(Reached):
                    call.through(module, hidden)
        finally:
            handle.remove()
