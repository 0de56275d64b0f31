"""Where the questions come from that networks are trained, tuned and tested on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from infoprune_export.bundle import file_sha256
from infoprune_export.data.vqa import ImageRef, load_questions
from infoprune_export.errors import MissingRequirement
from infoprune_export.job import Job
from infoprune_export.recipe import DataSource
from quality.versions import ROOT, code_version, digest

Split = Literal["train", "val", "test"]
"""`train` to train compressed networks on, `val` to choose parameters by, `test` to report."""

Asked = tuple[Any, Sequence[tuple[str, str]]]
"""An image (of Pillow) with its questions and reference answers."""


class Questions(Protocol):
    """The questions of a model's tasks."""

    def read(self, job: Job, split: Split) -> dict[str, Iterator[Asked]]:
        """Task name to images with their questions, in a fixed order."""

    def version(self, job: Job) -> str:
        """Names all of them."""


class Rendered:
    """tiny-llava's questions, rendered anew: the package holds a part of them only."""

    def read(self, job: Job, split: Split) -> dict[str, Iterator[Asked]]:
        from tiny_data import splits

        return {task: self._read(task, split) for task in splits.TASKS}

    def _read(self, task: str, split: Split) -> Iterator[Asked]:
        from tiny_data import easy_shapes, splits

        everything = len(easy_shapes.image_ids("train"))
        for sample in splits.calibration(task, everything, limit=5) if split == "train" else splits.evaluation(task, split):
            yield sample.image, [(q.text, q.answer) for q in sample.questions]

    def version(self, job: Job) -> str:
        from importlib.metadata import PackageNotFoundError, version

        try:
            images = version("easy-vqa")
        except PackageNotFoundError:
            raise MissingRequirement("easy-VQA needs the package easy-vqa", mend='pip install "infoprune-export[train]"') from None
        return digest((images, code_version((ROOT / "tools" / "tiny_data").glob("*.py"))))


class Files:
    """The recipe's own data; whole images, not questions drawn from all of them, so that they share a pass."""

    def read(self, job: Job, split: Split) -> dict[str, Iterator[Asked]]:
        return {task: self._read(source) for task, source in self._sources(job, split).items()}

    def _read(self, source: DataSource) -> Iterator[Asked]:
        by_image: dict[ImageRef, list[tuple[str, str]]] = {}
        for q in load_questions(source.path, source.split).questions:
            by_image.setdefault(q.image, []).append((q.question, q.answers[0]))
        for image, questions in by_image.items():
            yield image.open(), questions

    def _sources(self, job: Job, split: Split) -> dict[str, DataSource]:
        recipe = job.recipe
        if split == "test":
            return job.resolved(recipe.evaluation)
        return job.resolved(dict.fromkeys(recipe.evaluation, (recipe.validation if split == "val" else recipe.calibration)[0]))

    def version(self, job: Job) -> str:
        sources = [s for split in get_args(Split) for s in self._sources(job, split).values()]
        return digest([files_version(p for p in Path(s.path).rglob("*") if p.is_file()) for s in sources])


def files_version(files: Iterable[Path]) -> str:
    """A hash of files' contents, wherever they are."""
    return digest(sorted({(p.name, file_sha256(p)) for p in files}))
