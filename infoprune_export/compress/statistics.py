"""Pass 1: moments of activations and loss gradients, gathered in a stream over calibration batches.

For every attention block: mean and second moment of the concatenated head outputs (the output projection's
input), and the second moment of the loss gradient at the block's output. For every feed-forward matrix,
moments on its smaller side: of its input where it widens, of its output where it narrows. Memory does not
depend on the number of samples; sums are kept in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from infoprune_export.compress.moments import InputScale, Moments, TokenWeights
from infoprune_export.compress.walk import Walk
from infoprune_export.errors import InputError
from infoprune_export.models.anatomy import Anatomy, Layer, Linear, TowerName, site

if TYPE_CHECKING:
    from infoprune_export.compress.evidence import TaskGradients


@dataclass
class Batch:
    """Calibration samples of equal length, so that nothing is padded.

    Attributes:
        inputs: Keyword arguments of the model's forward (input_ids, attention_mask, pixel_values).
        targets: Token ids to predict at each position, -100 where there is no loss, shape [batch, sequence].
    """

    inputs: dict[str, Tensor]
    targets: Tensor

    @property
    def samples(self) -> int:
        return self.targets.shape[0]

    def to(self, device: torch.device) -> Batch:
        return Batch({name: t.to(device) for name, t in self.inputs.items()}, self.targets.to(device))


@dataclass
class Statistics:
    """What pass 1 found.

    Attributes:
        attention: Site of the output projection to moments of its input.
        ffn: Site of a feed-forward matrix to moments of its smaller side (see `input_side`).
        gradients: Site to moments of the loss gradient: at the output for output-side maps; pulled back through
            the map to its input (`W^T g`) for input-side ones.
        gradient_energy: Site to the mean of `|g|^2` per output, summed over samples, for regularisation.
        losses: Site of a feed-forward matrix to what `lowrank.loss_moment` has made of its gradients, shape [n, n].
        scales: Site of a feed-forward matrix to the mean absolute value of its inputs, where it was asked for.
        task: Gradients of the reference answers' loss, where a head score asks for them.
        samples: Questions seen.
        weighted: Whether gradients were gathered.
    """

    attention: dict[str, Moments] = field(default_factory=dict)
    ffn: dict[str, Moments] = field(default_factory=dict)
    gradients: dict[str, Moments] = field(default_factory=dict)
    gradient_energy: dict[str, float] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, InputScale] = field(default_factory=dict)
    task: TaskGradients | None = None
    samples: int = 0
    weighted: bool = True

    def of(self, layer: Layer) -> Statistics:
        """What is known of one layer: all of it is at hand."""
        return self

    def take_in(self, other: Statistics) -> None:
        """Adds the sites of another layer."""
        for name in ("attention", "ffn", "gradients", "gradient_energy", "losses", "scales"):
            getattr(self, name).update(getattr(other, name))

    def check_finite(self) -> None:
        """Makes sure that every moment is a number.

        Raises:
            InputError: naming the site that is not.
        """
        for key, moments in [*self.attention.items(), *self.ffn.items(), *self.gradients.items()]:
            check_finite(key, moments)


def check_finite(key: str, seen: Moments | InputScale) -> None:
    """Makes sure that what was seen at a site is a number.

    Raises:
        InputError: naming the site.
    """
    if not torch.isfinite(seen.outer if isinstance(seen, Moments) else seen.total).all():
        raise InputError(
            f"calibration gives activations or gradients that are not finite at {key}",
            mend="check the model's weights and the calibration images",
        )


def input_side(linear: Linear) -> bool:
    """Whether a map's moments are gathered at its input (it widens) or at its output (it narrows)."""
    return linear.d_out > linear.d_in


def shares_input(layer: Layer, role: str) -> str | None:
    """The role, walked before, of a feed-forward matrix that reads the same input as another: what is seen of one is seen of both."""
    return "gate" if role == "up" and "gate" in layer.ffn.matrices else None


def without_bias(module: nn.Linear, output: Tensor) -> Tensor:
    return output if module.bias is None else output - module.bias


def gather(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Iterable[Batch],
    *,
    weighted: bool = True,
    scales: bool = False,
    text_share: float | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    task: TaskGradients | None = None,
    finish: Callable[[Layer, Statistics], None] | None = None,
    directory: Path | None = None,
    progress: Callable[[Layer], None] = lambda layer: None,
) -> Statistics:
    """Runs the calibration batches through the original and gathers every moment.

    Args:
        model: The original, in evaluation mode.
        anatomy: Of that model.
        batches: In a fixed order.
        weighted: Also run a backward pass and gather the moments of loss gradients.
        scales: Also gather the mean absolute inputs of the feed-forward matrices.
        text_share: Of the text tokens in the language model's moments; see `TokenWeights`.
        temperature: Of the model's own predictions, from which the labels of the backward pass are drawn.
        seed: For those draws.
        task: Gradients of the reference answers' loss that were gathered before, to go with the rest.
        finish: Gets each layer with its own statistics when its turn is over, its weights still in memory; nothing of them is
            kept then, so memory does not grow with the number of layers.
        directory: For hidden states; an earlier run that was killed is gone on from, and `finish` is not called again for its layers.
        progress: Called when a layer is done.

    Returns:
        The statistics of all layers; where `finish` has had them, none.

    Raises:
        InputError: no samples, activations that are not finite, or a loss without any gradient.
    """
    batches = list(batches)
    if not batches:
        raise InputError("no calibration samples", mend="name some with --calibration PATH")
    whole = Statistics(task=task, weighted=weighted, samples=sum(b.samples for b in batches))
    current = Statistics()
    generator = torch.Generator().manual_seed(seed)
    tokens = TokenWeights(text_share, model.config.image_token_id)

    @contextmanager
    def watch(layer: Layer) -> Iterator[None]:
        nonlocal current
        current = Statistics(task=task, weighted=weighted, samples=whole.samples)
        with _hooks(model, layer, current, scales, tokens):
            yield

    def turn_over(layer: Layer) -> None:
        nonlocal current
        current.check_finite()
        if finish:
            finish(layer, current)
        else:
            whole.take_in(current)
        current = Statistics()

    walk = Walk(
        model,
        anatomy,
        batches,
        watch,
        start=lambda batch: tokens.start(batch.inputs["input_ids"]),
        finish=turn_over,
        advance=progress,
        directory=directory,
    )
    if weighted:
        walk.forward_and_back(lambda logits, targets: fisher_loss(logits, targets, temperature, generator))
    else:
        walk.forward()
    if weighted and finish is None and not any(m.outer.any() for m in whole.gradients.values()):
        raise no_gradient()
    return whole


def no_gradient() -> InputError:
    """What is said where the loss moves nothing."""
    return InputError(
        "the loss has no gradient on the calibration data",
        mend="use other data, or criterion.weighting: activation with criterion.heads: ks-activation in the recipe",
    )


def fisher_loss(logits: Tensor, targets: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Loss whose gradient's second moment is the Fisher information of the softened predictions.

    The labels are drawn from the model's own predictions at the positions that have a target: with the
    reference answers instead, gradients vanish on every question that the model already answers.

    Args:
        logits: Shape [batch, sequence, vocabulary].
        targets: Shape [batch, sequence]; -100 marks positions that are left out.
        temperature: Divides the logits.
        generator: For the draws.
    """
    picked = (logits[targets != -100] / temperature).float()
    labels = torch.multinomial(picked.detach().softmax(-1).cpu(), 1, generator=generator).to(picked.device)
    return -picked.log_softmax(-1).gather(-1, labels).sum()


@contextmanager
def _hooks(model: nn.Module, layer: Layer, stats: Statistics, scales: bool, tokens: TokenWeights) -> Iterator[None]:
    handles = list(_layer_hooks(model, layer, stats, scales, tokens))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_hooks(model: nn.Module, layer: Layer, stats: Statistics, scales: bool, tokens: TokenWeights) -> Iterator[RemovableHandle]:
    o, tower = layer.attention.o, layer.tower
    key = site(layer.tower, layer.index, "o")
    stats.attention[key] = Moments.zeros(o.d_in)
    module = model.get_submodule(o.path)
    yield module.register_forward_pre_hook(lambda m, args, key=key: stats.attention[key].add(args[0], tokens.of(tower)))
    if stats.weighted:
        stats.gradients[key] = Moments.zeros(o.d_out)
        yield module.register_full_backward_hook(lambda m, _, grad, key=key: stats.gradients[key].add(grad[0]))
    for role, linear in layer.ffn.matrices.items():
        key = site(layer.tower, layer.index, role)
        module = model.get_submodule(linear.path)
        shared = shares_input(layer, role)
        if shared and input_side(linear):
            stats.ffn[key] = stats.ffn[site(tower, layer.index, shared)]
        else:
            stats.ffn[key] = Moments.zeros(min(linear.d_in, linear.d_out))
            yield module.register_forward_hook(observer(linear, stats.ffn[key], tower, tokens))
        if scales and shared:
            stats.scales[key] = stats.scales[site(tower, layer.index, shared)]
        elif scales:
            stats.scales[key] = InputScale.zeros(linear.d_in)
            yield module.register_forward_hook(observer(linear, stats.scales[key], tower, tokens))
        if stats.weighted:
            stats.gradients[key] = Moments.zeros(min(linear.d_in, linear.d_out))
            stats.gradient_energy[key] = 0.0
            yield module.register_full_backward_hook(_gradient_observer(stats, key, linear))


def at_input(linear: Linear, into: Moments | InputScale | None) -> bool:
    """Whether an accumulator takes the inputs of a feed-forward matrix, and not its outputs."""
    return isinstance(into, InputScale) or (into is not None and input_side(linear))


def observer(
    linear: Linear, into: Moments | InputScale, tower: TowerName, tokens: TokenWeights
) -> Callable[[nn.Module, tuple, Tensor], None]:
    """A forward hook for a feed-forward matrix: moments of its smaller side, or the scale of its inputs."""

    def observe(module: nn.Linear, args: tuple, output: Tensor) -> None:
        into.add(args[0] if at_input(linear, into) else without_bias(module, output), tokens.of(tower))

    return observe


def _gradient_observer(stats: Statistics, key: str, linear: Linear) -> Callable:
    def observe(module: nn.Linear, grad_input: tuple, grad_output: tuple) -> None:
        g = grad_output[0]
        stats.gradients[key].add(g @ module.weight if input_side(linear) else g)
        stats.gradient_energy[key] += float(g.double().square().sum()) / linear.d_out

    return observe
