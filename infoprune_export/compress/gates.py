"""Which heads go, learned: gates on every unit, trained under a constraint on FLOPs, then made binary by one ranking.

The weights stay as they are, so the network with all gates open is its own teacher, and removal and refit follow as
they do without training. How many heads go is not learned: the target is a share of the attention FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infoprune_export.compress.allocate import LayerKey, UnitChoice, allocate, by_layer
from infoprune_export.compress.concrete import Gates, draw, open_probability, settled
from infoprune_export.compress.decide import layers_to_cut, least_units, units_of
from infoprune_export.compress.findings import Findings
from infoprune_export.compress.lessons import Remembered
from infoprune_export.compress.packing import IGNORE, Packed, Row, pack
from infoprune_export.compress.prices import Flops
from infoprune_export.compress.recover import divergence
from infoprune_export.compress.taps import Taps
from infoprune_export.compress.training import Share, generator, train
from infoprune_export.errors import InputError
from infoprune_export.models.anatomy import Anatomy
from infoprune_export.plans import Plan
from infoprune_export.progress import Progress, Silent

SPREAD = 4.0
"""Distance between the first log_a of the best and of the worst unit by score."""
HEAD_START = 0.5
"""Share of what is to go that is closed, in expectation, when training begins."""
RISE = 0.3
"""Share of the steps in which the target goes from there to where it belongs."""
TRAVEL = 20.0
"""Rate of the gates times the steps: farther, and noise closes gates for good; a closed one has no gradient."""
DRAWS = 4
"""Draws of all gates in one share of a batch: their noise is what the gradient suffers from most."""
MULTIPLIER_RATE = 2.0
DAMPING = 20.0
"""First value of l2, in nats: keeps the expected FLOPs from swinging about their target."""
INFORMATION_WEIGHT = 0.1
"""mu, in nats: how much the scores are trusted where the data say little."""


@dataclass(frozen=True)
class Learned:
    """What the search found.

    Attributes:
        heads: (tower, layer) to the KV groups that stay, ascending; every layer that has gates.
        steps: Of training; 0 where no heads have to go.
        figures: `target`, `kept` and `expected` are shares of the units' FLOPs: wanted, after the gates were made
            binary, and before; `undecided` counts gates that were neither open nor closed by then, `swapped` the
            units that would have gone by their scores and stay.
    """

    heads: dict[LayerKey, list[int]]
    steps: int
    figures: dict[str, float]


def learn_heads_of(
    plan: Plan,
    model: nn.Module,
    findings: Findings,
    rows: Sequence[Row],
    *,
    steps: int,
    directory: Path | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
) -> Learned:
    """Learns which units stay where a plan says how many: `learn_heads` with the plan's own scores, share, floors and seed.

    `decide(..., heads=...)` then makes the plan that keeps them, and gives the feed-forwards what they leave over.
    """
    cut = layers_to_cut(plan.anatomy, plan.workload, plan.budget.scope)
    units = units_of(findings, cut, plan.criterion, Flops(plan.anatomy, plan.workload))
    return learn_heads(
        model,
        plan.anatomy,
        rows,
        units,
        target=planned_share(plan, units),
        steps=steps,
        stay=least_units(cut, plan.criterion),
        seed=plan.seed,
        directory=directory,
        progress=progress,
        threads=threads,
    )


def learn_heads(
    model: nn.Module,
    anatomy: Anatomy,
    rows: Sequence[Row],
    units: Sequence[UnitChoice],
    *,
    target: float,
    steps: int,
    stay: Mapping[LayerKey, int] | None = None,
    batch: int = 8,
    seed: int = 0,
    directory: Path | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
) -> Learned:
    """Learns which units stay.

    Args:
        model: The original, in evaluation mode; as it was afterwards.
        anatomy: Of that model.
        rows: Training rows.
        units: Every unit of the layers that may be cut, with its score and its FLOPs (see `decide.units_of`).
        target: Share of the units' FLOPs that stays (see `planned_share`).
        steps: Of training.
        stay: How many units of a layer stay at least; 1 where a layer is not named.
        batch: Rows per step.
        seed: For the order of the rows and the noise of the gates.
        directory: For checkpoints; training goes on from one that is there.
        progress: Told about steps, loss and expected FLOPs.
        threads: See `training.train`.

    Returns:
        The units with the highest probability of being open that cost no more than the target, at least one per
        layer; equal ones in the order of tower, layer and group.

    Raises:
        InputError: nothing to train on, or a loss that stays without a finite gradient.
        MissingRequirement: `accelerate` is not installed.
    """
    progress = progress or Silent()
    total = sum(u.cost for u in units)
    allowance = round(target * total)
    if total <= allowance:
        progress.note("no heads have to go: nothing for gates to learn")
        return Learned(by_layer(set(units)), 0, {"target": target, "kept": 1.0, "expected": 1.0, "undecided": 0, "swapped": 0})
    if not rows:
        raise InputError("no training data", mend="name some with --calibration PATH, or training in the recipe")
    keys = {u.layer for u in units}
    layers = {(x.tower, x.index): x for x in anatomy.layers() if (x.tower, x.index) in keys}
    units = sorted(units, key=lambda u: (list(layers).index(u.layer), u.group))
    gates = Gates(model, list(layers.values()))
    try:
        search = HeadSearch(model, anatomy.head_path, gates, units, rows, target=target, steps=steps, batch=batch, seed=seed)
        train(search, steps=steps, name="heads", directory=directory, progress=progress, device=search.device, threads=threads, alone=True)
    finally:
        gates.close()
    chance = open_probability(search.log_a.detach().double().cpu()).tolist()
    kept = allocate([replace(u, value=p * u.cost) for u, p in zip(units, chance, strict=True)], [], allowance, stay=stay)
    by_score = allocate(units, [], allowance, stay=stay)
    z = settled(search.log_a.detach())
    figures = {
        "target": target,
        "kept": kept.cost / total,
        "expected": search.expected_flops().item(),
        "undecided": int(((z > 0) & (z < 1)).sum()),
        "swapped": sum(len(set(groups) - set(by_score.units[layer])) for layer, groups in kept.units.items()),
    }
    progress.note(
        f"heads learned in {steps} steps: {figures['kept']:.2f} of the attention's FLOPs stay, "
        f"{figures['swapped']} head groups are not those that the scores would keep"
    )
    return Learned(kept.units, steps, figures)


def planned_share(plan: Plan, units: Sequence[UnitChoice]) -> float:
    """Share of the units' FLOPs that a plan keeps: what a search for heads of the same budget is to keep."""
    return sum(u.cost for u in units if u.group in plan.decision(*u.layer).kv_groups) / sum(u.cost for u in units)


class HeadSearch:
    """The objective of the gates; our reading of the information-loss objective (see docs/method.md).

    `CE + KL(open | gated) + l1 (f - t) + l2 (f - t)^2 + mu mean_u P(z_u > 0) (1 - score_u)`: f the expected share of
    the units' FLOPs, t its target, l1 and l2 raised by gradient ascent (CoFi, arXiv 2204.00408).

    Args:
        model: The original, in evaluation mode.
        head_path: Its output head.
        gates: On that model.
        units: One for each gate, in their order.
        rows: Training rows.
        target: Share of the units' FLOPs that is to stay.
        steps: How many there will be.
        batch: Rows per step; at least one for each share.
        seed: For the order of the rows and the noise of the gates.
    """

    def __init__(
        self,
        model: nn.Module,
        head_path: str,
        gates: Gates,
        units: Sequence[UnitChoice],
        rows: Sequence[Row],
        *,
        target: float,
        steps: int,
        batch: int = 8,
        seed: int = 0,
    ):
        self.taps, self.head, self.gates, self.rows = Taps(model, []), model.get_submodule(head_path), gates, rows
        self.size, self.seed, self.device = batch, seed, self.head.weight.device
        self.costs = _costs(units).to(self.device)
        self.unimportance = 1 - _places(units).to(self.device)
        self.start, self.target, self.rise = 1 - HEAD_START * (1 - target), target, max(1, round(RISE * steps))
        self.log_a = initial_log_a(units, self.start).to(self.device).requires_grad_()
        self.multipliers = torch.tensor([0.0, DAMPING], device=self.device, requires_grad=True)
        self.rate = TRAVEL / steps
        self.taught = Remembered(self._open, lambda logits: (logits,))

    def parameter_groups(self) -> list[dict[str, Any]]:
        # With betas 0 and a large eps AdamW is plain ascent: l1 moves in proportion to the excess.
        ascent = {"lr": MULTIPLIER_RATE, "betas": (0.0, 0.0), "eps": 1.0, "maximize": True, "constant": True}
        return [{"params": [self.log_a], "lr": self.rate}, {"params": [self.multipliers], **ascent}]

    def state_dict(self) -> dict[str, Any]:
        return {"log_a": self.log_a.detach(), "multipliers": self.multipliers.detach()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.log_a.copy_(state["log_a"])
        self.multipliers.copy_(state["multipliers"])

    def expected_flops(self) -> Tensor:
        """f: the expected share of the units' FLOPs, a scalar."""
        return open_probability(self.log_a) @ self.costs

    def wanted(self, step: int) -> float:
        """t at a step."""
        return self.start + (self.target - self.start) * min(1.0, (step + 1) / self.rise)

    def loss(self, step: int, share: Share) -> tuple[Tensor, dict[str, float]]:
        chosen = self.batch(step, max(self.size, share.of))[share.index :: share.of]
        numbers = generator(self.seed, step, share)
        logits, targets, taught = [], [], []
        for own in (chosen[n::DRAWS] for n in range(min(DRAWS, len(chosen)))):
            packed = pack([self.rows[i] for i in own])
            u = torch.rand(self.gates.count, generator=numbers).clamp(1e-6, 1 - 1e-6)
            with self.gates.set(draw(self.log_a, u.to(self.device))):
                logits.append(self._answers(packed))
            targets.append(packed.targets[packed.targets != IGNORE])
            taught += [self.taught[i] for i in own]
        answers = torch.cat(logits)
        agreement = divergence(answers, torch.cat(taught).to(self.device), 1.0)
        task = F.cross_entropy(answers, torch.cat(targets).to(self.device)) + agreement
        return task + self.price(step), {"loss": task.item(), "expected FLOPs": self.expected_flops().item()}

    def price(self, step: int) -> Tensor:
        """What the open gates cost: the part of the loss that does not look at the data, a scalar."""
        excess = self.expected_flops() - self.wanted(step)
        lost = (open_probability(self.log_a) * self.unimportance).mean()
        return self.multipliers[0] * excess + self.multipliers[1] * excess.square() + INFORMATION_WEIGHT * lost

    def batch(self, step: int, size: int) -> list[int]:
        """Rows of one step: each once before any twice."""
        chosen = []
        for n in range(step * size, (step + 1) * size):
            lap, place = divmod(n, len(self.rows))
            chosen.append(int(np.random.default_rng([self.seed, lap]).permutation(len(self.rows))[place]))
        return chosen

    @torch.no_grad()
    def _open(self, row: int) -> Tensor:
        """What the network with all gates open answers to a row."""
        return self._answers(pack([self.rows[row]])).cpu()

    def _answers(self, packed: Packed) -> Tensor:
        """Logits at the positions with a target, shape [targets, vocabulary] float32."""
        _, states = self.taps.run(packed.inputs)
        return self.head(states[(packed.targets != IGNORE).to(self.device)]).float()


def initial_log_a(units: Sequence[UnitChoice], share: float) -> Tensor:
    """Gates evenly spaced in the order of the units' scores per FLOP, at a given expected share of the FLOPs.

    Returns:
        Shape [units], float32.
    """
    places, costs = SPREAD * _places(units).double(), _costs(units).double()
    low, high = -20.0 - SPREAD, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if open_probability(places + middle) @ costs < share else (low, middle)
    return (places + high).float()


def _places(units: Sequence[UnitChoice]) -> Tensor:
    """Place of each unit in the order of scores per FLOP, from 0 for the least to 1, equals in between; shape [units] float32."""
    worth = torch.tensor([u.value / u.cost for u in units], dtype=torch.float64)
    lower, equal = (worth[:, None] > worth).sum(1), (worth[:, None] == worth).sum(1)
    return (lower + (equal - 1) / 2) / max(1, len(units) - 1)


def _costs(units: Sequence[UnitChoice]) -> Tensor:
    """Each unit's part of all their FLOPs, shape [units] float32."""
    total = sum(u.cost for u in units)
    return torch.tensor([u.cost / total for u in units])
