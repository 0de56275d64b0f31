"""The one training loop: an objective's parameters, some steps, checkpoints, exact resume, a guard against NaN.

Recovery (`recover.py`) and the search for heads (`gates.py`) are objectives. A step's batch is split into shares:
threads of this process (small matrices do not fill two cores) times the processes that `accelerate launch` started,
one for each device. Gradients are averaged over all shares in a fixed order, and whatever an objective draws it
draws from `generator(seed, step, share)`: the same seed and number of shares give the same weights, interrupted or not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from infoprune_export.compress.accelerators import OneProcess, make_accelerator
from infoprune_export.errors import InputError
from infoprune_export.files import written_whole
from infoprune_export.launched import processes
from infoprune_export.progress import Progress, Silent

MOST_SHARES = 4
"""Threads that work on shares of their own; more cores than these work together inside a share."""
PATIENCE_FOR_NAN = 5
"""Steps in a row without a finite gradient after which training is given up."""
WARM_UP = 0.1
"""Share of the steps in which the rate rises."""
PEAK = 5.0
"""Peak rate over that of the best first step, where it is looked for. Steps that follow agree less than the weights of one."""
SMALLEST_RATE, LARGEST_RATE = 1e-7, 1e-2
"""Where it is looked for."""
BATCHES_FOR_RATE = 3
"""The least of what so many batches allow is taken: one alone may be twice too bold."""


Item = TypeVar("Item")


class Share(NamedTuple):
    """Which part of a step's batch."""

    index: int
    of: int

    def take(self, batch: list[Item]) -> list[Item]:
        """The items `index, index + of, index + 2 of ...`; one of the others where there are fewer items than shares."""
        return batch[self.index :: self.of] or [batch[self.index % len(batch)]]


WHOLE = Share(0, 1)


class Outcome(NamedTuple):
    """What a training came to.

    Attributes:
        rate: Peak rate of the groups that named none; None if all named one.
        kept: Step after which the state was as it is now; None where no validation chose it.
        steps: How many were taken: fewer than asked for where patience was at its end.
    """

    rate: float | None
    kept: int | None
    steps: int


class Objective(Protocol):
    """What is trained and by which loss."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups as AdamW takes them: `params` and the peak `lr`; the loop finds one where it is None, see `_Loop.find_rate`.

        Beside AdamW's own keys (`weight_decay`, `betas`, `maximize` ...) a group may have `clip`, the largest norm
        of its gradient (default 1), and `constant`, true where the rate is to stay at its peak.
        """

    def loss(self, step: int, share: Share) -> tuple[Tensor, dict[str, float]]:
        """The mean loss over one share of a step's batch, and figures to show.

        Called from several threads at once on the CPU, so it may not change the objective's state.
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes, as tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to such a state."""


@dataclass(frozen=True)
class Validation:
    """How the best state is found; without it the last one is kept.

    Attributes:
        score: The larger, the better; called before the first step and between steps.
        every: Steps between two looks.
        patience: Looks without a better score after which training ends early; never when None.
    """

    score: Callable[[], float]
    every: int
    patience: int | None = None


@dataclass
class _State:
    """What a checkpoint holds beside the objective and the optimiser."""

    step: int = 0
    rate: float = 1.0
    found: float | None = None
    bad: int = 0
    best_score: float = -math.inf
    best_step: int = 0
    best: dict[str, Any] | None = None
    waited: int = 0


def generator(seed: int, step: int, share: Share = WHOLE) -> torch.Generator:
    """Random numbers that depend on these alone."""
    (mixed,) = np.random.SeedSequence([seed, step, share.index, share.of]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed) % 2**63)


def train(
    objective: Objective,
    *,
    steps: int,
    name: str = "training",
    directory: Path | None = None,
    progress: Progress | None = None,
    validation: Validation | None = None,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    checkpoint_seconds: float = 60.0,
    alone: bool = False,
) -> Outcome:
    """Trains an objective; it has its final (with validation: its best) state afterwards.

    AdamW; the rate rises linearly over a tenth of the steps and falls as a cosine to a hundredth. A step whose
    gradient is not finite is left out and halves the rate from there on.

    Args:
        objective: What to train; its parameters are on `device` already.
        steps: How many optimiser steps.
        name: Names the checkpoint and the progress bar.
        directory: Gets `<name>.checkpoint`; one that is there is gone on from. None: no checkpoints.
        progress: Told about steps and figures.
        validation: How to find the best state.
        device: On CUDA, products are in bfloat16 where the device has it, except `alone`.
        threads: CPU threads; as many as PyTorch's when None.
        checkpoint_seconds: Time between checkpoints.
        alone: Other processes of the same launch take no part.

    Raises:
        InputError: no finite gradient several times in a row, or no finite loss to find a rate by.
        MissingRequirement: `accelerate` is needed and not installed.
    """
    loop = _Loop(objective, steps, torch.device(device), threads, alone)
    path = directory / f"{name}.checkpoint" if directory else None
    if path and path.is_file():
        loop.load(path)
    saved = time.monotonic()
    with (progress or Silent()).bar(name, steps) as advance, loop:
        advance(loop.state.step)
        if not loop.state.step:
            if validation:
                loop.look(validation)  # training that only harms leaves the state as it was
            if any(g["lr"] is None for g in loop.groups):
                loop.find_rate()
        while loop.state.step < steps:
            advance(1, loop.step())
            if validation and (loop.state.step % validation.every == 0 or loop.state.step == steps) and loop.look(validation):
                break
            if path and time.monotonic() - saved > checkpoint_seconds:
                loop.save(path)
                saved = time.monotonic()
    if loop.state.best is None:
        return Outcome(loop.state.found, None, loop.state.step)
    objective.load_state_dict(loop.state.best)
    return Outcome(loop.state.found, loop.state.best_step, loop.state.step)


class _Loop:
    """An objective with its optimiser, and everything that a checkpoint holds."""

    def __init__(self, objective: Objective, steps: int, device: torch.device, threads: int | None, alone: bool):
        self.objective, self.steps, self.state = objective, steps, _State()
        self.accelerator = OneProcess() if alone or (device.type == "cpu" and processes() == 1) else make_accelerator(device)
        self.groups = objective.parameter_groups()
        self.parameters = [p for g in self.groups for p in g["params"]]
        own = [{k: v for k, v in g.items() if k not in ("clip", "constant", "lr")} for g in self.groups]
        self.optimizer = torch.optim.AdamW(own, betas=(0.9, 0.98), weight_decay=0.0)
        self.threads = threads or torch.get_num_threads()
        self.local = min(self.threads, MOST_SHARES) if device.type == "cpu" else 1

    def __enter__(self) -> _Loop:
        each, self.before = max(1, self.threads // self.local), torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.local, initializer=lambda: torch.set_num_threads(each))
        return self

    def __exit__(self, *raised: object) -> None:
        self.pool.shutdown()
        torch.set_num_threads(self.before)

    @property
    def shares(self) -> list[Share]:
        """Those of this process."""
        first = self.local * self.accelerator.process_index
        return [Share(first + i, self.local * self.accelerator.num_processes) for i in range(self.local)]

    @torch.no_grad()
    def find_rate(self) -> None:
        """Finds a peak rate for the groups that name none; nothing else is changed.

        AdamW's first step moves every weight by the rate, along the sign of its gradient. How far one can go varies by orders of
        magnitude between networks: a large activation meets a whole row of weights that move together. The rate doubles
        as long as such a step lowers its own batch's loss further, as in a learning-rate range test (Smith 2017,
        arXiv 1506.01186); the peak is `PEAK` times the best, the least of the first batches'.
        """
        best = []
        for step in range(min(BATCHES_FOR_RATE, self.steps)):
            self.state.step = step
            best.append(self._best_first_step())
        self.state.step = 0
        self.state.found = PEAK * min(best)

    def _best_first_step(self) -> float:
        """The rate of the first step that lowers the loss of the batch under way most."""
        results = list(self.pool.map(self._gradients, self.shares))  # in threads, where gradients are on
        self._collect([grads for grads, _ in results])
        moved = [p for g in self.groups if g["lr"] is None for p in g["params"] if p.grad is not None]
        before, signs = [p.clone() for p in moved], [p.grad.sign() for p in moved]
        self.optimizer.zero_grad(set_to_none=True)
        rate, best, least = SMALLEST_RATE, SMALLEST_RATE, math.inf
        while rate <= LARGEST_RATE:
            for p, start, sign in zip(moved, before, signs, strict=True):
                p.copy_(start - rate * sign)
            if not (loss := self._mean_loss()) < least:
                break
            best, least, rate = rate, loss, 2 * rate
        for p, start in zip(moved, before, strict=True):
            p.copy_(start)
        if math.isinf(least):
            raise InputError(
                f"training batch {self.state.step + 1} has no finite loss to find a rate by",
                mend="check the model's weights and the training images, or name recovery.rate in the recipe",
            )
        return best

    def _mean_loss(self) -> float:
        """Of the batch of the step to come, over all shares."""
        losses = list(self.pool.map(self._loss, self.shares))
        mean = sum(losses) / len(losses)
        return float(self.accelerator.reduce(mean, "mean") if self.accelerator.num_processes > 1 else mean)

    def _loss(self, share: Share) -> Tensor:
        with torch.no_grad():  # in float32: in half precision the first, smallest steps change nothing, or anything
            return self.objective.loss(self.state.step, share)[0]

    def step(self) -> str:
        """One step of the optimiser, or none where the gradient is not finite; returns figures to show."""
        state = self.state
        results = list(self.pool.map(self._gradients, self.shares))
        self._collect([grads for grads, _ in results])
        if self._clip():
            for group, own in zip(self.optimizer.param_groups, self.groups, strict=True):
                peak = state.found if own["lr"] is None else own["lr"]
                group["lr"] = peak * state.rate * (1.0 if own.get("constant") else schedule(state.step, self.steps))
            self.optimizer.step()
            state.bad = 0
        else:
            state.bad += 1
            state.rate /= 2
            if state.bad == PATIENCE_FOR_NAN:
                raise InputError(
                    f"training has had no finite gradient for {PATIENCE_FOR_NAN} steps in a row (at step {state.step + 1})",
                    mend="lower recovery.rate in the recipe, and check the model's weights and the training images",
                )
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        figures = [f for _, f in results]
        return ", ".join(f"{k} {sum(f[k] for f in figures) / len(figures):.3g}" for k in figures[0])

    def _gradients(self, share: Share) -> tuple[tuple[Tensor | None, ...], dict[str, float]]:
        with self.accelerator.autocast():
            loss, figures = self.objective.loss(self.state.step, share)
        return torch.autograd.grad(loss, self.parameters, allow_unused=True), figures

    def _collect(self, shares: list[tuple[Tensor | None, ...]]) -> None:
        """Averages the shares of this process, then those of all processes."""
        for parameter, *grads in zip(self.parameters, *shares, strict=True):
            known = [g for g in grads if g is not None]
            parameter.grad = sum(known[1:], known[0]) / len(grads) if known else None
        if self.accelerator.num_processes > 1:
            for parameter in self.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def _clip(self) -> bool:
        """Clips each group's gradient; returns whether all are finite."""
        norms = [
            torch.nn.utils.clip_grad_norm_(g["params"], g.get("clip", 1.0))
            for g in self.groups
            if any(p.grad is not None for p in g["params"])
        ]
        return bool(norms) and all(math.isfinite(float(n)) for n in norms)

    def look(self, validation: Validation) -> bool:
        """Remembers the state if it is the best so far; returns whether patience is at its end."""
        state, score = self.state, validation.score()
        if score >= state.best_score:
            best = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in self.objective.state_dict().items()}
            state.best, state.best_score, state.best_step, state.waited = best, score, state.step, 0
        else:
            state.waited += 1
        return validation.patience is not None and state.waited >= validation.patience

    def save(self, path: Path) -> None:
        """Writes a checkpoint; a killed run leaves the old one or the new one whole."""
        if not self.accelerator.is_main_process:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"objective": self.objective.state_dict(), "optimizer": self.optimizer.state_dict(), "state": vars(self.state)}
        with written_whole(path) as f:
            torch.save(content, f)

    def load(self, path: Path) -> None:
        content = torch.load(path, map_location="cpu", weights_only=True)
        self.objective.load_state_dict(content["objective"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.state = _State(**content["state"])


def schedule(step: int, steps: int) -> float:
    """Share of the peak rate at a step: up linearly, then down as a cosine to a hundredth."""
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))
