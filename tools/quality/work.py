"""Making and asking one network: what a worker process does."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from infoprune_export.errors import InputError
from infoprune_export.job import Job
from quality.methods import METHODS, ORIGINAL
from quality.questions import Split
from quality.rows import Row, Task, Versions
from quality.settings import SETTINGS, SettingName
from quality.versions import commit

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from infoprune_export.compress.statistics import Statistics
    from quality.exam import Exam


def start(threads: int) -> None:
    """Readies a process: several of one thread each do more than one of several."""
    import torch

    torch.set_num_threads(threads)


@dataclass(eq=False)
class Bench:
    """One setting's model and questions, loaded once in a process and used for every row."""

    setting: SettingName
    device: str = "cpu"
    _exams: dict[tuple[Split, int | None], dict[str, Exam]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.job = SETTINGS[self.setting].job(device=self.device)
        self.model = self.job.whole_original()
        self.job.__dict__["original"] = self.model
        self.anatomy, self.workload = self.job.anatomy, self.job.workload
        self._look()

    def _look(self) -> None:
        """Takes down what was just read from disk, so that no row gets the name of something else."""
        self.versions = Versions()
        self.versions.of(self.setting)

    def exams(self, split: Split, images: int | None) -> dict[str, Exam]:
        if (split, images) not in self._exams:
            self._exams[split, images] = SETTINGS[self.setting].exams(self.job, split, images)
        return self._exams[split, images]

    @lru_cache(maxsize=4)  # noqa: B019 (a bench lives as long as its process)
    def statistics(self, seed: int, text_share: float | None) -> tuple[list[Any], Statistics]:
        """The calibration batches of a seed, and everything that any method asks of them: they are seen once for all.

        Args:
            seed: Of the draw.
            text_share: See `Criterion`; of its fields only this one changes what is gathered, and not just how much.
        """
        from infoprune_export.compress.evidence import gather_for, gather_task

        job = SETTINGS[self.setting].job(seed=seed, device=self.device)
        job.__dict__ |= {"anatomy": self.anatomy, "original": self.model}
        # Our heads with ASVD need the loss gradients and the scales of inputs: all that there is but for the next line.
        everything = job.recipe.criterion.model_copy(update={"heads": "ks", "weighting": "asvd", "text_share": text_share})
        found = gather_for(everything, self.model, self.anatomy, job.batches, seed=seed)
        found.task = gather_task(self.model, self.anatomy, job.batches, gates=True, weights=True)
        self._look()
        return job.batches, found

    @cached_property
    def training_rows(self) -> list[Any]:
        return SETTINGS[self.setting].training_rows(self.job)

    def job_for(self, task: Task) -> Job:
        """A job that makes a task's network, with all that tasks share in its place."""
        from infoprune_export.compress.findings import look_at_all

        recipe, method = SETTINGS[self.setting].recipe, METHODS[task.method]
        criterion = method.criterion(task.parameters)
        changes = {"flops": task.budget, "criterion": criterion, "train_steps": task.steps, "recovery": method.recovery(recipe.recovery)}
        job = SETTINGS[self.setting].job(recipe.model_copy(update=changes), task.seed, self.device)
        batches, statistics = self.statistics(task.seed, criterion.text_share)
        findings = look_at_all(self.model, self.anatomy, statistics, criterion, task.seed)
        job.__dict__ |= {
            "checkpoint": self.job.checkpoint,
            "anatomy": self.anatomy,
            "workload": self.workload,
            "original": copy.deepcopy(self.model),
            "batches": batches,
            "survey": statistics,
            "findings": findings,
        }
        if task.steps:
            job.__dict__["training_rows"] = self.training_rows
        return job

    def ask(self, model: nn.Module, task: Task) -> dict[str, np.ndarray]:
        """Which questions of each of the setting's tasks a network answers."""
        return {name: exam.verdicts(model) for name, exam in self.exams(task.split, task.images).items()}


@lru_cache(maxsize=2)
def bench(setting: SettingName, device: str) -> Bench:
    return Bench(setting, device)


def measure(task: Task, key: str, device: str = "cpu") -> Row:
    """Makes a task's network and asks it.

    Args:
        task: Which network and which questions.
        key: Of the row.
        device: Where PyTorch computes; the time that compressing takes is that of the CPU whatever this says.

    Raises:
        RuntimeError: the model, the data or the code are not those that the key names.
    """
    row = Row(key, task, device=device_name(device), commit=commit())
    if task.split is None:
        row.seconds["compress"] = compress_seconds(task)
        return row
    here = bench(task.setting, device)
    if task.method == ORIGINAL.name:
        model, row.flops = here.model, 1.0
    else:
        model = _make(here, task, row)
    if here.versions.key_of(task) != key:
        raise RuntimeError(f"{task}: the model, the data or the code changed while this ran; run it again")
    if model is None:
        return row
    begin = time.perf_counter()
    verdicts = here.ask(model, task)
    row.seconds["evaluate"] = round(time.perf_counter() - begin, 1)
    row.accuracy = {name: float(v.mean()) for name, v in verdicts.items()}
    row.n = {name: len(v) for name, v in verdicts.items()}
    return row


def _make(here: Bench, task: Task, row: Row) -> nn.Module | None:
    """A task's network, with what making it took put into its row; None, with the reason, where it cannot be made."""
    job = here.job_for(task)
    begin = time.perf_counter()
    try:
        model = job.original
        plan = job.factors(job.decide())
    except InputError as e:
        row.failed = str(e)
        return None
    row.flops, row.seconds["compress"] = plan.budget.predicted, round(time.perf_counter() - begin, 1)
    if task.steps:
        begin = time.perf_counter()
        job.recover(plan, model)
        model.eval().requires_grad_(False)
        row.seconds["train"] = round(time.perf_counter() - begin, 1)
    return model


def device_name(device: str) -> str:
    """What a reader knows a device by."""
    import torch

    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def compress_seconds(task: Task) -> float:
    """Seconds from a loaded model to the smaller one: calibration questions, statistics, plan and factors."""
    recipe = SETTINGS[task.setting].recipe
    job = SETTINGS[task.setting].job(recipe.model_copy(update={"flops": task.budget}), task.seed)
    job.original  # noqa: B018 (loaded before the clock starts)
    begin = time.perf_counter()
    job.factors(job.decide())
    return round(time.perf_counter() - begin, 1)
