"""Pass 2: the factors, layer by layer in depth order, each on what the compressed prefix really gives it.

Within a layer: moments of the head outputs with all heads there -> the output projection refitted on the kept
ones; heads removed; moments of the feed-forward's input -> gate and up; those put in place; moments of the
narrowing matrix's output -> down. The hidden states of the calibration batches travel from layer to layer, so
every layer runs a fixed number of times however deep the model is.

With `criterion.recalibrate: false` the moments are those of pass 1, on the original, and nothing runs again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from infoprune_export.compress.heads import fold_mean, refit_output
from infoprune_export.compress.lowrank import Observed, factorise, nothing_seen, seen_before, weighting
from infoprune_export.compress.moments import Moments, TokenWeights
from infoprune_export.compress.spill import Spill
from infoprune_export.compress.statistics import Batch, Statistics, at_input, check_finite, observer, shares_input
from infoprune_export.compress.surgery import dense, head_rows, low_rank, prune_heads
from infoprune_export.compress.walk import Reached, Stage
from infoprune_export.models.anatomy import Layer, site
from infoprune_export.models.streamed import at_hand
from infoprune_export.plans import Factors, Plan
from infoprune_export.recipe import WeightingName
from infoprune_export.stopwatch import Stopwatch
from infoprune_export.tensors import TensorFile, described, write_tensors


class PassOne(Protocol):
    """What pass 1 knows, layer by layer: `Statistics` in memory, or a `findings.Survey` on disk."""

    def of(self, layer: Layer) -> Statistics:
        """Of one layer."""


@torch.no_grad()
def make_factors(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    stats: PassOne,
    *,
    progress: Callable[[str], None] | None = None,
    directory: Path | None = None,
    stopwatch: Stopwatch | None = None,
) -> Factors:
    """Makes the factors of a plan; a model whose weights are in memory is compressed on the way.

    Args:
        model: The original; used up.
        plan: What to keep.
        batches: Calibration batches.
        stats: Pass 1 on the original, for the loss gradients.
        progress: Called with a layer's name when it is done.
        directory: For hidden states and the factors of every layer as they are made, of a model that is laid out: an earlier run
            that was killed is gone on from. Temporary, with all factors in memory, when None.
        stopwatch: Gets what running the calibration data takes (`calibration`), and all else (`algebra`).

    Returns:
        The contents of factors.safetensors, by name; those in `directory` stay there.
    """
    stopwatch = stopwatch or Stopwatch()
    with ExitStack() as until:
        until.enter_context(stopwatch.measuring("algebra"))
        states = Spill(directory or Path(until.enter_context(tempfile.TemporaryDirectory(prefix="infoprune-"))))
        stage = Stage(model, plan.anatomy, batches, states, "prefix")
        tokens = TokenWeights(plan.criterion.text_share, model.config.image_token_id)
        source = _Prefix(stage, model, tokens, stopwatch) if plan.criterion.recalibrate else _OneShot(stats)
        factors: dict[str, np.ndarray] = {}
        for layer in layers_walked(plan):
            source.reach(layer)
            kept = None if directory is None else directory / f"factors.{layer.tower}.{layer.index}.safetensors"
            if kept is None or not kept.is_file() or not source.passed(layer):
                with at_hand(model, layer.path) as module:
                    made = _cut_layer(model, layer, plan, source, stats) if _cuts(plan, layer) else {}
                    arrays = {name: tensor.contiguous().numpy() for name, tensor in made.items()}
                    if kept:
                        write_tensors(kept, described(arrays), arrays.items())
                    source.advance(layer, module)
            factors |= TensorFile(kept) if kept else arrays
            if progress:
                progress(f"{layer.tower} {layer.index}")
    return {name: factors[name] for name in sorted(factors)}


def layers_walked(plan: Plan) -> list[Layer]:
    """The layers in front of the last that is cut, and itself, in depth order."""
    layers = list(plan.anatomy.layers())
    return layers[: max((i + 1 for i, layer in enumerate(layers) if _cuts(plan, layer)), default=0)]


def _cuts(plan: Plan, layer: Layer) -> bool:
    return plan.decision(layer.tower, layer.index).cuts(layer)


def _cut_layer(model: nn.Module, layer: Layer, plan: Plan, source: _Prefix | _OneShot, stats: PassOne) -> dict[str, Tensor]:
    known = stats.of(layer)
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
    inputs: dict[str, Observed] = {}
    for role, linear in layer.ffn.matrices.items():
        if (rank := decision.ranks[role]) is None:
            continue
        key, module = site(layer.tower, layer.index, role), model.get_submodule(linear.path)
        seen = inputs.get(shares_input(layer, role) or role) or source.feed_forward(model, layer, role, rule)
        if at_input(linear, seen):
            inputs[role] = seen  # the layer need not run again for another that reads them
        weight, bias = _on_cpu(module)
        w = weighting(rule, key, linear, weight.double(), seen, known)
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

    stats: PassOne

    def reach(self, layer: Layer) -> None:
        pass

    def passed(self, layer: Layer) -> bool:
        return True

    def attention(self, model: nn.Module, layer: Layer) -> Moments:
        return self.stats.of(layer).attention[site(layer.tower, layer.index, "o")]

    def feed_forward(self, model: nn.Module, layer: Layer, role: str, rule: WeightingName) -> Observed:
        return seen_before(rule, site(layer.tower, layer.index, role), self.stats.of(layer))

    def advance(self, layer: Layer, module: nn.Module) -> None:
        pass


@dataclass(frozen=True)
class _Prefix:
    """The calibration batches in front of one layer, as the compressed prefix gives them."""

    stage: Stage
    model: nn.Module
    tokens: TokenWeights
    stopwatch: Stopwatch

    def reach(self, layer: Layer) -> None:
        """Enters a layer's tower, if that has not been done."""
        if layer.tower not in self.stage.calls:
            with self.stopwatch.measuring("calibration"):
                self.stage.enter(self.stage.anatomy.tower(layer.tower))

    def passed(self, layer: Layer) -> bool:
        return self.stage.passed(layer)

    def attention(self, model: nn.Module, layer: Layer) -> Moments:
        """Moments of a layer's head outputs, which are its output projection's inputs."""
        o, moments = layer.attention.o, Moments.zeros(layer.attention.o.d_in)
        self._watch(layer, o.path, lambda module, args, y: moments.add(args[0], self.tokens.of(layer.tower)))
        check_finite(site(layer.tower, layer.index, "o"), moments)
        return moments

    def feed_forward(self, model: nn.Module, layer: Layer, role: str, rule: WeightingName) -> Observed:
        """What a rule has to see of one feed-forward matrix."""
        linear = layer.ffn.matrices[role]
        if (seen := nothing_seen(rule, linear)) is not None:
            self._watch(layer, linear.path, observer(linear, seen, layer.tower, self.tokens))
            check_finite(site(layer.tower, layer.index, role), seen)
        return seen

    def advance(self, layer: Layer, module: nn.Module) -> None:
        """Takes the batches through a layer."""
        with self.stopwatch.measuring("calibration"):
            self.stage.put_behind(layer, self.stage.through(layer, module))
            self.stage.drop(layer)

    def _watch(self, layer: Layer, path: str, hook: Callable[[nn.Module, tuple, Tensor], None]) -> None:
        """Runs a layer as far as one map inside it, with a forward hook there."""

        def take(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            hook(module, args, output)
            raise Reached  # what the layer does after this map is not needed here

        handle = self.model.get_submodule(path).register_forward_hook(take)
        module = self.model.get_submodule(layer.path)
        with self.stopwatch.measuring("calibration"), ExitStack() as until:
            until.callback(handle.remove)
            for n, call in self.stage.calls[layer.tower].items():
                self.tokens.start(call.batch.inputs["input_ids"])
                with suppress(Reached):
                    call.through(module, self.stage.state(layer, n))
