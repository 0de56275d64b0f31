"""Rows: one network each, and the file they are kept in.

A row is named by all that it depends on: the model's weights, the criterion, the budget, the seed, the training, the
questions and the code. A file of rows can therefore be killed, gone on with and added to, and what was measured on
another model or by other code is never taken for this one's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quality.methods import METHODS
from quality.questions import Split
from quality.settings import SETTINGS, SettingName
from quality.versions import ROOT, code_version, digest, with_imports

_PACKAGE = ROOT / "infoprune_export"
_FREE = [_PACKAGE / "compress" / f"{name}.py" for name in ("calibration", "evidence", "decide", "factors")]
_FREE += [_PACKAGE / "runtime" / f"{name}.py" for name in ("prompts", "images")]
_TRAINED = [*_FREE, *(_PACKAGE / "compress" / f"{name}.py" for name in ("gates", "recover"))]
"""What makes networks; what these import counts as well."""
_ASKING = [Path(__file__).with_name(name) for name in ("exam.py", "questions.py")]


@dataclass(frozen=True)
class Task:
    """One network to be made and asked.

    Attributes:
        setting: Which model.
        method: Name in `methods.METHODS`.
        budget: Fraction of the FLOPs kept; 1 for the original.
        seed: Of the calibration draw and of all that is random.
        split: What it is asked; None for nothing, where the time that compression takes is all that is wanted.
        steps: Of training; 0 for none.
        parameters: What was, or is to be, chosen on the validation split.
        images: The first so many images of each task of the split; as the setting says when None.
    """

    setting: SettingName
    method: str
    budget: float
    seed: int = 0
    split: Split | None = "test"
    steps: int = 0
    parameters: dict[str, Any] = field(default_factory=dict, hash=False)
    images: int | None = None

    @property
    def group(self) -> str:
        """`tiny.free.0.5`, or `tiny.trained.0.33`: what its row is compared within."""
        return f"{self.setting}.{'trained' if self.steps else 'free'}.{self.budget:g}"

    def __str__(self) -> str:
        extra = "".join(f" {k}={v:g}" for k, v in self.parameters.items()) if self.split == "val" else ""
        return f"{self.group} {self.method}{extra} seed {self.seed} ({self.split or 'time'})"


@dataclass
class Row:
    """What was measured of one network.

    Attributes:
        key: See `key_of`.
        task: What was asked for.
        flops: Fraction kept, counted from the plan.
        accuracy: Of each of the model's tasks, 0 to 1, exact match.
        n: Questions of each.
        seconds: `compress` and `evaluate`, wall clock of one thread on a machine that may be shared.
        failed: Why there is no network, such as a budget that cannot be reached; None if there is one.
        device: What PyTorch computed on: `cpu`, or the name of a GPU.
        commit: At which it was measured.
    """

    key: str
    task: Task
    flops: float | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    n: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failed: str | None = None
    device: str = "cpu"
    commit: str = ""

    @property
    def place(self) -> tuple[str, str, int]:
        """Where it stands in the results: group, method and seed."""
        return self.task.group, self.task.method, self.task.seed

    @property
    def mean(self) -> float:
        """Mean accuracy over the model's tasks, 0 to 1."""
        return sum(self.accuracy.values()) / len(self.accuracy)


class Versions:
    """Hashes of what rows depend on beside their task, each taken once."""

    def __init__(self) -> None:
        self._settings: dict[str, str] = {}
        self.free, self.trained = (code_version([*with_imports(files), *_ASKING]) for files in (_FREE, _TRAINED))

    def of(self, setting: SettingName) -> str:
        """Of a setting's model and questions."""
        if setting not in self._settings:
            self._settings[setting] = SETTINGS[setting].version()
        return self._settings[setting]

    def key_of(self, task: Task) -> str:
        """Names a row by all that its figures depend on."""
        method = METHODS[task.method]
        criterion = method.criterion(task.parameters).model_dump(mode="json")
        images = task.images or (SETTINGS[task.setting].tune_images, SETTINGS[task.setting].test_images)
        parts = (task.budget, task.seed, task.split, images, task.steps, sorted(criterion.items(), key=str))
        if task.steps:
            setting = SETTINGS[task.setting]
            parts += (setting.train_images, setting.recipe.validation, method.recovery(setting.recipe.recovery))
        if task.method == "original":
            parts = (task.split, images)
        return digest((self.of(task.setting), self.trained if task.steps else self.free, parts))


class RowFile:
    """Rows in a file of JSON lines, by their key."""

    def __init__(self, path: Path):
        self.path, self.rows = path, {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue  # a run was killed while it wrote this line
                row = Row(**record | {"task": Task(**record["task"])})
                self.rows[row.key] = row

    def get(self, key: str) -> Row | None:
        return self.rows.get(key)

    def add(self, row: Row) -> None:
        """Keeps a row; it is on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.is_file() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with self.path.open("a", encoding="utf-8") as f:
            f.write("\n" * torn + json.dumps(asdict(row)) + "\n")
            f.flush()
            os.fsync(f.fileno())
        self.rows[row.key] = row

    def earlier(self, rows: Iterable[Row]) -> list[Row]:
        """Rows of the test split that earlier code measured and that none of `rows` replaces, the last of each place."""
        places = {row.place for row in rows}
        return list(
            {r.place: r for r in self.rows.values() if r.task.split == "test" and not r.task.images and r.place not in places}.values()
        )

    def missing(self, tasks: Iterable[Task], versions: Versions) -> list[Task]:
        """Tasks that have no row yet, in their order, each once."""
        return list({key: t for t in tasks if (key := versions.key_of(t)) not in self.rows}.values())
