"""What a criterion has to see of the data: which passes it takes, and the gradients of the reference answers.

Some published head scores look at the loss of the *reference* answers, `L(x) = -log p(answer | question, image)`,
and not at that of labels drawn from the model, as ours do (see statistics.py). Their evidence is gathered in a
pass of its own, and only what is asked for; its size does not depend on the number of samples.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from infoprune_export.compress.scores import HEAD_RULES, Need
from infoprune_export.compress.statistics import Batch, Statistics, gather
from infoprune_export.compress.walk import Walk
from infoprune_export.errors import InputError
from infoprune_export.models.anatomy import ATTENTION_ROLES, Anatomy, Layer, site
from infoprune_export.recipe import Criterion
from infoprune_export.tensors import TensorFile, described, write_tensors


@dataclass
class TaskGradients:
    """Gradients of the reference answers' loss.

    Attributes:
        gates: Site of the output projection to the sum over samples of `|z_u^T dL/dz_u|`, z_u the outputs of a
            unit's heads at every position, shape [kv_groups]: how much the loss moves when the unit is turned down.
        weights: Site of q, k, v and o to `dL/dW` summed over the samples, shape of the weight.
    """

    gates: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


def passes(criterion: Criterion) -> int:
    """How often the calibration data go through the original in pass 1."""
    return 1 + bool(task_needs(criterion))


def task_needs(criterion: Criterion) -> frozenset[Need]:
    """What a criterion asks of the gradients of the reference answers: `gates`, `weights` or nothing."""
    return HEAD_RULES[criterion.heads].needs & {"gates", "weights"}


def needs_gradients(criterion: Criterion) -> bool:
    """Whether a criterion looks at the gradients of a loss with drawn labels."""
    return criterion.weighting == "loss" or "fisher" in HEAD_RULES[criterion.heads].needs


def gather_for(
    criterion: Criterion,
    model: nn.Module,
    anatomy: Anatomy,
    batches: Sequence[Batch],
    *,
    seed: int = 0,
    progress: Callable[[Layer], None] = lambda layer: None,
    finish: Callable[[Layer, Statistics], None] | None = None,
    directory: Path | None = None,
) -> Statistics:
    """Pass 1 as a criterion needs it; see `statistics.gather` for arguments and errors.

    Args:
        criterion: Says which moments and gradients are gathered.
        model: The original.
        anatomy: Of that model.
        batches: In a fixed order.
        seed: For drawing labels.
        progress: Called when a layer is done, which happens `passes(criterion)` times.
        finish: As for `statistics.gather`; gradients of the reference answers are gathered before.
        directory: Likewise.
    """
    needs, task = task_needs(criterion), None
    if needs:
        task = gather_task(
            model,
            anatomy,
            batches,
            gates="gates" in needs,
            weights="weights" in needs,
            progress=progress,
            directory=directory and directory / "task",
        )
    return gather(
        model,
        anatomy,
        batches,
        weighted=needs_gradients(criterion),
        scales=criterion.weighting == "asvd",
        text_share=criterion.text_share,
        temperature=criterion.temperature,
        seed=seed,
        progress=progress,
        task=task,
        finish=finish,
        directory=directory,
    )


def gather_task(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Iterable[Batch],
    *,
    gates: bool = False,
    weights: bool = False,
    progress: Callable[[Layer], None] = lambda layer: None,
    directory: Path | None = None,
) -> TaskGradients:
    """Gathers gradients of the reference answers' loss.

    Args:
        model: The original, in evaluation mode.
        anatomy: Of that model.
        batches: In a fixed order.
        gates: What a unit's gate does to the loss, sample by sample.
        weights: The gradient of the attention's weights.
        progress: Called when a layer is done.
        directory: For hidden states and the gradients of every layer as they are gathered: an earlier run that was killed is gone on
            from. Temporary, with all gradients in memory, when None.

    Raises:
        InputError: the loss has no finite gradient other than zero.
    """
    found, samples = TaskGradients(), _Samples()
    watch = lambda layer: _hooks(model, layer, found, samples, gates, weights)

    def keep(layer: Layer) -> None:
        if directory:
            _keep(layer, found, directory)

    # A file holds all that its layer gives, though its turn may have been cut short after it.
    if directory and all(_file(directory, layer).is_file() for layer in anatomy.layers()):
        for layer in anatomy.layers():
            progress(layer)
    else:
        states = directory and directory / "states"
        walk = Walk(model, anatomy, list(batches), watch, start=samples.start, finish=keep, advance=progress, directory=states)
        walk.forward_and_back(task_loss)
    if directory:
        shutil.rmtree(directory / "states", ignore_errors=True)
        for layer in anatomy.layers():
            for name, array in TensorFile(_file(directory, layer)).items():
                kind, _, key = name.partition("/")
                getattr(found, kind)[key] = torch.from_numpy(array)
    gathered = [*found.gates.items(), *found.weights.items()]
    for key, value in gathered:
        if not torch.isfinite(value).all():
            raise InputError(
                f"the reference answers give gradients that are not finite at {key}",
                mend="check the model's weights and the calibration images",
            )
    if not any(value.any() for _, value in gathered):
        raise InputError(
            "the loss of the reference answers has no gradient on the calibration data",
            mend="use data that the model does not answer with certainty, or criterion.heads: ks in the recipe",
        )
    return found


def _file(directory: Path, layer: Layer) -> Path:
    return directory / f"{layer.tower}.{layer.index}.safetensors"


def _keep(layer: Layer, found: TaskGradients, directory: Path) -> None:
    """Moves what was found of a layer to its file."""
    keys = [site(layer.tower, layer.index, role) for role in ATTENTION_ROLES]
    moved = {f"gates/{k}": found.gates.pop(k) for k in keys if k in found.gates}
    moved |= {f"weights/{k}": found.weights.pop(k) for k in keys if k in found.weights}
    arrays = {name: tensor.numpy() for name, tensor in moved.items()}
    write_tensors(_file(directory, layer), described(arrays), arrays.items())


def task_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """`-log p` of every target, summed over positions and samples."""
    picked = targets != -100
    return nn.functional.cross_entropy(logits[picked].float(), targets[picked], reduction="sum")


@contextmanager
def _hooks(model: nn.Module, layer: Layer, found: TaskGradients, samples: _Samples, gates: bool, weights: bool) -> Iterator[None]:
    handles: list[RemovableHandle] = [_watch_gates(model, layer, found, samples)] if gates else []
    thawed: list[nn.Parameter] = []
    for role in ATTENTION_ROLES if weights else ():
        parameter = model.get_submodule(layer.linear(role).path).weight
        if not parameter.requires_grad:
            thawed.append(parameter.requires_grad_())
        handles.append(_watch_weight(parameter, found, site(layer.tower, layer.index, role)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in thawed:
            parameter.requires_grad_(False)


class _Samples:
    """Samples in the batch that is under way: a vision tower sees images, of which a sample may have several."""

    now = 0

    def start(self, batch: Batch) -> None:
        self.now = batch.samples


def _watch_gates(model: nn.Module, layer: Layer, found: TaskGradients, samples: _Samples) -> RemovableHandle:
    key, groups = site(layer.tower, layer.index, "o"), layer.attention.kv_groups
    found.gates[key] = torch.zeros(groups, dtype=torch.float64)

    def watch(module: nn.Module, args: tuple) -> None:
        z = args[0].detach()

        def add(gradient: Tensor) -> None:
            moved = (z.float() * gradient.float()).reshape(samples.now, -1, groups, z.shape[-1] // groups).sum((1, 3), dtype=torch.float64)
            found.gates[key] += moved.abs().sum(0).cpu()

        args[0].register_hook(add)

    return model.get_submodule(layer.attention.o.path).register_forward_pre_hook(watch)


def _watch_weight(parameter: nn.Parameter, found: TaskGradients, key: str) -> RemovableHandle:
    found.weights[key] = torch.zeros(parameter.shape, dtype=torch.float32)

    def add(p: nn.Parameter) -> None:
        found.weights[key] += p.grad.float().cpu()
        p.grad = None

    return parameter.register_post_accumulate_grad_hook(add)
