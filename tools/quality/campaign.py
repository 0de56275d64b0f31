"""What is measured, in which order, and how it is gone through: the most important rows first, several at a time."""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from fnmatch import fnmatch

from quality.methods import ABLATIONS, METHODS, OURS, PAIRS, SWAPS
from quality.rows import Row, RowFile, Task, Versions
from quality.settings import SETTINGS, SettingName
from quality.work import measure, start

TRAINED_BUDGETS = {"tiny": (0.33, 0.5), "smol": (0.33,)}
STEPS = {"tiny": 600, "smol": 300}
TRAINED_PAIRS = {"tiny": 2, "smol": 1}
ABLATION_BUDGET = 0.5
QUICK_BUDGETS = (0.6, 0.33)
QUICK_IMAGES = 400
"""Images of each task's test split in a quick run: the first so many, the same for every method."""
BEST_PAIR = "best pair "
"""`best pair 1` is the pair that the validation split likes best at a budget, `best pair 2` the next."""


@dataclass(frozen=True)
class Stage:
    """Rows that are measured together, without parameters yet: those are chosen on validation when it begins."""

    name: str
    tasks: tuple[Task, ...]


def stages() -> list[Stage]:
    """The whole proof, the most important part first."""
    ours_and_pairs = (OURS, *PAIRS)
    tiny, smol = sorted(SETTINGS["tiny"].budgets), SETTINGS["smol"].budgets
    return [
        Stage(
            "tiny.free",
            (
                Task("tiny", "original", 1.0),
                *(Task("tiny", m.name, b, seed) for seed in range(3) for b in tiny for m in ours_and_pairs),
            ),
        ),
        Stage("tiny.trained", _trained("tiny")),
        Stage("smol.free", (Task("smol", "original", 1.0), *(Task("smol", m.name, b) for b in smol for m in ours_and_pairs))),
        Stage("smol.trained", _trained("smol")),
        Stage("smol.seeds", tuple(Task("smol", m, b, seed) for b in smol for seed in (1, 2) for m in (OURS.name, *_best_pairs(2)))),
        Stage("ablations", tuple(Task("tiny", m.name, ABLATION_BUDGET) for m in ABLATIONS)),
        *(
            Stage(f"swaps.{part}", tuple(Task("tiny", m.name, b, seed) for seed in seeds for b in budgets for m in SWAPS))
            for part, seeds, budgets in (("low", (0,), tiny[:2]), ("high", (0,), tiny[2:]), ("seeds", (1, 2), tiny))
        ),
    ]


def _trained(setting: SettingName) -> tuple[Task, ...]:
    methods = (OURS.name, *_best_pairs(TRAINED_PAIRS[setting]))
    return tuple(Task(setting, m, b, steps=STEPS[setting]) for b in TRAINED_BUDGETS[setting] for m in methods)


def _best_pairs(n: int) -> list[str]:
    return [f"{BEST_PAIR}{i + 1}" for i in range(n)]


def quick_stage() -> Stage:
    """tiny-llava without training at two budgets and one seed, on a part of the test questions."""
    tasks = [Task("tiny", "original", 1.0, images=QUICK_IMAGES)]
    tasks += [Task("tiny", m.name, b, images=QUICK_IMAGES) for b in QUICK_BUDGETS for m in (OURS, *PAIRS)]
    return Stage("quick", tuple(tasks))


def only(found: Iterable[Stage], patterns: Sequence[str]) -> list[Stage]:
    """What of the stages is asked for: a pattern names a stage, a group such as `tiny.free.0.5`, or a method."""
    if not patterns:
        return list(found)

    def wanted(stage: Stage, task: Task) -> bool:
        return any(fnmatch(name, p) for p in patterns for name in (stage.name, task.group, task.method))

    kept = [Stage(s.name, tuple(t for t in s.tasks if wanted(s, t))) for s in found]
    return [s for s in kept if s.tasks]


class Tuned:
    """Parameters chosen on the validation split, from rows."""

    def __init__(self, book: RowFile, versions: Versions):
        self.book, self.versions = book, versions

    def tasks(self, setting: SettingName, method: str, budget: float) -> list[Task]:
        """The candidates of a method at a budget, as tasks on the validation split."""
        tuned_at = SETTINGS[setting].tuned_at or budget
        images = SETTINGS[setting].tune_images
        return [Task(setting, method, tuned_at, split="val", parameters=p, images=images) for p in METHODS[method].candidates(tuned_at)]

    def rows(self, setting: SettingName, method: str, budget: float) -> list[Row]:
        """Their rows, in the order of the candidates.

        Raises:
            LookupError: not all are measured.
        """
        found = [self.book.get(self.versions.key_of(t)) for t in self.tasks(setting, method, budget)]
        if None in found:
            raise LookupError(f"{method} is not tuned on {setting} at {budget:g}")
        return found

    def best(self, setting: SettingName, method: str, budget: float) -> tuple[dict, float]:
        """The parameters of the best candidate, the earlier of equals, and its accuracy on the validation split."""
        rows = self.rows(setting, method, budget)
        scores = [-1.0 if r.failed else r.mean for r in rows]
        first = scores.index(max(scores))
        return list(METHODS[method].candidates(budget))[first], scores[first]

    def pairs(self, setting: SettingName, budget: float) -> list[str]:
        """Names of the pairs, the best on the validation split first."""
        return sorted((m.name for m in PAIRS), key=lambda name: -self.best(setting, name, budget)[1])

    def filled(self, task: Task) -> Task:
        """A task with its method named and its parameters chosen."""
        if task.method.startswith(BEST_PAIR):
            place = int(task.method.removeprefix(BEST_PAIR)) - 1
            task = replace(task, method=self.pairs(task.setting, task.budget)[place])
        if task.method == "original":
            return task
        return replace(task, parameters=self.best(task.setting, task.method, task.budget)[0])

    def needed(self, tasks: Iterable[Task]) -> list[Task]:
        """Candidates that must be measured before tasks can be filled in, each once."""
        wanted: dict[tuple, None] = {}
        for t in tasks:
            if t.method.startswith(BEST_PAIR):
                wanted |= {(t.setting, m.name, t.budget): None for m in PAIRS}
            elif t.method != "original":
                wanted[t.setting, t.method, t.budget] = None
        return [candidate for which in wanted for candidate in self.tasks(*which)]


class Crew:
    """Worker processes that measure rows, each with threads of its own; a GPU they share."""

    def __init__(self, workers: int, threads: int, book: RowFile, versions: Versions, device: str = "cpu"):
        self.book, self.versions, self.device, self.broken = book, versions, device, 0
        self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start, (threads,))

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def measure(self, title: str, tasks: Iterable[Task]) -> None:
        """Measures what has no row yet; every row is on disk before the next line is told."""
        todo = self.book.missing(tasks, self.versions)
        if not todo:
            return
        begin = time.monotonic()
        futures: dict[Future, Task] = {self.pool.submit(measure, t, self.versions.key_of(t), self.device): t for t in todo}
        for done, future in enumerate(as_completed(futures), 1):
            left = (time.monotonic() - begin) / done * (len(todo) - done)
            try:
                row = future.result()
            except Exception:  # one row that cannot be measured must not cost the others
                self.broken += 1
                _tell(f"{futures[future]}: not measured\n{traceback.format_exc()}")
                continue
            self.book.add(row)
            _tell(f"{title} {done}/{len(todo)}, {left / 60:.0f} min left · {describe(row)}")


def describe(row: Row) -> str:
    """One line for a person."""
    if row.failed:
        return f"{row.task}: {row.failed}"
    if not row.accuracy:
        return f"{row.task}: {' + '.join(f'{v:.0f}' for v in row.seconds.values())} s"
    parts = " ".join(f"{name} {value:.3f}" for name, value in row.accuracy.items())
    return f"{row.task}: {row.mean:.4f} ({parts}) {' + '.join(f'{v:.0f}' for v in row.seconds.values())} s"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
