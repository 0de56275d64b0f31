"""Recovery: the compressed network learns from the original again what it lost (knowledge distillation).

The loss has three parts: cross-entropy on the answers where they are known, the divergence of the softened predictions (Hinton et al.
2015) at the same positions, and the distance of hidden states after some layers of both towers and behind the
projector. Trained are the linear maps of the layers and of the projector, low-rank pairs in place; norms and
embeddings stay, so that what was learned is carried by the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infoprune_export.compress.adapters import Adapters
from infoprune_export.compress.lessons import Remembered
from infoprune_export.compress.lowrank import LowRankLinear
from infoprune_export.compress.packing import IGNORE, Row, pack
from infoprune_export.compress.taps import Taps, tap_points
from infoprune_export.compress.training import Share, Validation, train
from infoprune_export.errors import InputError
from infoprune_export.models.anatomy import Anatomy
from infoprune_export.plans import Plan, TrainingRecord
from infoprune_export.progress import Progress
from infoprune_export.recipe import Recovery

LOOKS = 10
"""How often the validation questions are asked."""
SORTED_TOGETHER = 8
"""Batches whose rows are drawn together and sorted by length, so that little is padded."""


def recover(
    student: nn.Module,
    teacher: nn.Module,
    plan: Plan,
    rows: Sequence[Row],
    settings: Recovery,
    *,
    steps: int,
    data: Sequence[str] = (),
    validation: Sequence[Row] = (),
    directory: Path | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> Plan:
    """Trains a compressed network, in place, to answer as the original does.

    Args:
        student: The compressed network.
        teacher: The original, on the same device.
        plan: What was cut.
        rows: Questions to train on.
        settings: Weights of the losses, batch and rate.
        steps: How many.
        data: Names of the data sets, recorded in the plan.
        validation: Questions to choose the best state by; the last state is kept when there are none.
        directory: For checkpoints; training goes on from one that is there.
        progress: Told about steps and figures.
        seed: For the order of the rows.

    Returns:
        The plan with its trained factors.

    Raises:
        InputError: nothing to train on, or a loss that stays without a finite gradient.
        MissingRequirement: `accelerate` is not installed.
    """
    if not rows:
        raise InputError("no training data", mend="name some with --calibration PATH, or training in the recipe")
    objective = Distillation(student, teacher, plan, rows, settings, seed=seed)
    look = None
    if validation:
        score = lambda: float(np.mean([x for row in answers_right(student, plan.anatomy, validation) for x in row]))
        look = Validation(score, every=max(1, steps // LOOKS), patience=settings.patience)
    device = next(student.parameters()).device
    try:
        outcome = train(objective, steps=steps, name="recovery", directory=directory, progress=progress, validation=look, device=device)
    finally:
        objective.close()
    record = record_of(rows, data, plan.training)
    record.steps, record.rate, record.kept = record.steps + outcome.steps, settings.rate or outcome.rate, outcome.kept
    trained = plan.model_copy(update={"training": record})
    trained.factors = trained_factors(student, plan)
    return trained


def record_of(rows: Sequence[Row], data: Sequence[str], before: TrainingRecord | None = None) -> TrainingRecord:
    """What a network is trained on, for its plan; steps are filled in by those who train.

    Args:
        rows: The questions.
        data: Names of their data sets.
        before: What the plan says already: heads may have been learned, or factors that are trained further.
    """
    return TrainingRecord(
        head_steps=before.head_steps if before else 0,
        steps=before.steps if before else 0,
        data=list(data),
        images=len({id(r.pixels) for r in rows}),
        questions=sum(int(r.owners.max()) + 1 for r in rows),
    )


@dataclass(frozen=True)
class Lesson:
    """What the original has to say about one row, on the CPU.

    Attributes:
        logits: At the positions with a target, shape [targets, vocabulary] float32.
        hidden: Tap to hidden states of the row, shape [tokens, width] bfloat16.
    """

    logits: Tensor
    hidden: dict[str, Tensor]


class Distillation:
    """Distillation of a compressed network as an objective of `training.train`.

    Args:
        student: The compressed network; its linear maps are made trainable.
        teacher: The original, frozen.
        plan: What was cut.
        rows: Training rows.
        settings: Weights of the losses, batch and rate.
        seed: For the order of the rows.
        memory: See `Remembered`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        plan: Plan,
        rows: Sequence[Row],
        settings: Recovery,
        *,
        seed: int = 0,
        memory: int | None = None,
    ):
        self.student, self.teacher, self.anatomy, self.rows, self.settings = student, teacher, plan.anatomy, rows, settings
        self.seed, self.device = seed, next(student.parameters()).device
        self.lengths = tuple(len(r.ids) for r in rows)
        self.lessons = Remembered(self.lesson, lambda x: (x.logits, *x.hidden.values()), memory)
        paths = [linear.path for linear in plan.trained_maps().values()]
        student.requires_grad_(False)
        by_lora = settings.by_lora(sum(p.numel() for p in teacher.parameters()))
        self.adapters = Adapters(student, paths, settings.lora_rank, seed) if by_lora else None
        if self.adapters is None:
            for path in paths:
                student.get_submodule(path).requires_grad_()
        self.trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        points = tap_points(plan.anatomy, settings.hidden_every)
        self.taps = Taps(student, points), Taps(teacher, points)

    def close(self) -> None:
        """Takes the hooks off both networks, merges adapters and freezes the student again."""
        for taps in self.taps:
            taps.close()
        if self.adapters:
            self.adapters.merge()
        for p in self.trained.values():
            p.requires_grad_(False)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.trained.values()), "lr": self.settings.rate}]

    def state_dict(self) -> dict[str, Any]:
        return {name: p.detach() for name, p in self.trained.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, p in self.trained.items():
            p.copy_(state[name])

    def loss(self, step: int, share: Share) -> tuple[Tensor, dict[str, float]]:
        chosen = share.take(self.batch(step))
        packed = pack([self.rows[i] for i in chosen])
        lessons = [self.lessons[i] for i in chosen]
        hidden, states = self.taps[0].run(packed.inputs)
        wanted = packed.targets != IGNORE
        logits = self.student.get_submodule(self.anatomy.head_path)(states[wanted.to(self.device)]).float()
        answered = torch.tensor([self.rows[i].answered for i in chosen])[:, None].expand_as(wanted)[wanted]
        target, taught = packed.targets[wanted].to(self.device), torch.cat([x.logits for x in lessons]).to(self.device)
        s, nothing, parts = self.settings, logits.new_zeros(()), {}
        parts["ce"] = F.cross_entropy(logits[answered], target[answered]) if answered.any() else nothing
        parts["kl"] = divergence(logits, taught, s.temperature)
        real = packed.real.to(self.device)
        distances = [
            distance(h, [x.hidden[tap] for x in lessons if tap in x.hidden], real if self._in_language(tap) else None)
            for tap, h in hidden.items()
        ]
        parts["hidden"] = torch.stack(distances).mean() if distances else nothing
        total = s.answer_weight * parts["ce"] + s.teacher_weight * parts["kl"] + s.hidden_weight * parts["hidden"]
        return total, {"loss": total.item(), **{k: v.item() for k, v in parts.items()}}

    def _in_language(self, tap: str) -> bool:
        return tap.startswith(self.anatomy.language.path)

    def batch(self, step: int) -> list[int]:
        """Rows of one step: every row once an epoch, those of a batch about as long as each other."""
        size = min(self.settings.batch, len(self.rows))
        per_epoch = len(self.rows) // size
        return epoch_batches(self.lengths, size, self.seed, step // per_epoch)[step % per_epoch]

    def lesson(self, row: int) -> Lesson:
        """What the original says about a row, asked about it alone: so it does not matter when it is asked."""
        packed = pack([self.rows[row]])
        with torch.no_grad():
            hidden, states = self.taps[1].run(packed.inputs)
            logits = self.teacher.get_submodule(self.anatomy.head_path)(states[(packed.targets != IGNORE).to(self.device)])
        return Lesson(logits.float().cpu(), {tap: h[0].bfloat16().cpu() for tap, h in hidden.items()})


@lru_cache(maxsize=2)
def epoch_batches(lengths: tuple[int, ...], size: int, seed: int, epoch: int) -> list[list[int]]:
    """Rows of every batch of an epoch: each row once, those of a batch about as long as each other, in an order that the seed gives.

    Args:
        lengths: Of the rows, in tokens.
        size: Of a batch; rows past the last whole one are left to other epochs.
        seed: Of the training.
        epoch: Which.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))[: len(lengths) // size * size]
    batches = []
    for start in range(0, len(order), SORTED_TOGETHER * size):
        together = sorted(order[start : start + SORTED_TOGETHER * size], key=lengths.__getitem__)
        batches += [[int(i) for i in together[j : j + size]] for j in range(0, len(together), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def divergence(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(teacher || student)` of predictions softened by T, mean over positions; both [positions, vocabulary]."""
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (taught, logits))
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def distance(student: Tensor, taught: Sequence[Tensor], real: Tensor | None) -> Tensor:
    """Squared distance over the original's squared norm, mean over tokens.

    Args:
        student: Hidden states, shape [rows, tokens, width].
        taught: Those of the original, row by row, without padding.
        real: Which tokens are no padding, shape [rows, tokens]; all when None.
    """
    own = student.flatten(0, 1) if real is None else student[real]
    target = torch.cat(list(taught)).to(own)
    return ((own - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).mean()


@torch.no_grad()
def answers_right(model: nn.Module, anatomy: Anatomy, rows: Sequence[Row], batch: int = 16) -> list[list[bool]]:
    """Row by row and question by question, whether greedy decoding gives exactly the answer.

    With the right answer as prefix the most likely token is right at every position if and only if greedy decoding
    produces that very answer.
    """
    taps, device, head = Taps(model, []), next(model.parameters()).device, model.get_submodule(anatomy.head_path)
    right: list[list[bool]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        packed = pack([rows[i] for i in chosen])
        wanted = packed.targets != IGNORE
        _, states = taps.run(packed.inputs)
        correct = torch.ones_like(packed.real)
        correct[wanted] = head(states[wanted.to(device)]).argmax(-1).cpu() == packed.targets[wanted]
        for i, ok, owners in zip(chosen, correct, packed.owners, strict=True):
            right[i] = [bool(ok[owners == n].all()) for n in owners[owners >= 0].unique()]
    return right


def trained_factors(model: nn.Module, plan: Plan) -> dict[str, np.ndarray]:
    """Every trained map's weights under the names of factors.safetensors."""
    found = {}
    for key, linear in plan.trained_maps().items():
        module = model.get_submodule(linear.path)
        pair = isinstance(module, LowRankLinear)
        parts = {"first": module.first.weight, "second": module.second.weight} if pair else {"weight": module.weight}
        bias = module.second.bias if pair else module.bias
        parts |= {} if bias is None else {"bias": bias}
        found |= {f"{key}.{name}": t.detach().float().cpu().numpy() for name, t in parts.items()}
    return dict(sorted(found.items()))
