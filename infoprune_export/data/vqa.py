"""Visual questions and their official scores: VQAv2, TextVQA and GQA as they are distributed.

`load_questions` takes a directory or a questions file and finds out the rest; `score` says what
one answer is worth. `tiny:NAME` stands for the small sets that come with the package.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from infoprune_export.data.formats import read_questions, split_of
from infoprune_export.data.images import ImageFolder, ImageRef
from infoprune_export.data.scores import Format, metric_name, score
from infoprune_export.errors import InputError
from infoprune_export.recipe import near

__all__ = ["Format", "ImageRef", "Question", "QuestionSet", "load_questions", "metric_name", "score"]

PREFERRED_SPLITS = ("val", "testdev", "test", "train")
"""Which file of a directory is taken where no split is asked for: one with answers to be evaluated on."""
QUESTION_FOLDERS = ("", "questions", "Questions", "questions1.2")
PACKAGED = "tiny:"


@dataclass(frozen=True)
class Question:
    """One question about one image; `answers` is empty where the split keeps them secret."""

    id: str
    question: str
    answers: tuple[str, ...]
    image: ImageRef


@dataclass(frozen=True)
class QuestionSet:
    """Questions of one file.

    Attributes:
        format: Which benchmark's format and score.
        name: File they are from, without directories.
        questions: In the order of the file.
    """

    format: Format
    name: str
    questions: list[Question]

    def __len__(self) -> int:
        return len(self.questions)


def load_questions(path: Path | str, split: str | None = None, samples: int | None = None, seed: int = 0) -> QuestionSet:
    """Loads questions in an official format and finds their images.

    Args:
        path: A directory with the official file names, a questions file, or `tiny:NAME` for a packaged
            set (`tiny:vqa`, `tiny:textvqa`, `tiny:gqa`; `tiny:val/NAME` for its validation half).
        split: `train`, `val`, `testdev` or `test`. When None, the first that a directory has of
            `PREFERRED_SPLITS`; a file needs none.
        samples: How many questions to take; all when None. A larger sample holds every smaller one of
            the same seed.
        seed: Which questions a sample takes.

    Raises:
        InputError: nothing found, more than one format in the directory, malformed records (with file,
            record and field), or an image that is missing.
    """
    path = _packaged(str(path)) if str(path).startswith(PACKAGED) else Path(path)
    if not path.exists():
        raise InputError("does not exist", where=path, mend="give a directory or questions file of VQAv2, TextVQA or GQA, or tiny:NAME")
    file = _find_file(path, split) if path.is_dir() else _checked_file(path, split)
    content = read_questions(file)
    records = content.records
    if not records:
        raise InputError("holds no questions", where=file)
    if samples is not None and samples < len(records):
        lots = [hashlib.sha256(f"{seed}:{record.id}".encode()).digest() for record in records]
        drawn = sorted(range(len(records)), key=lots.__getitem__)[:samples]
        records = [records[i] for i in sorted(drawn)]
    roots = [path] if path.is_dir() else []
    roots += [file.parent] + ([file.parent.parent] if file.parent.name in QUESTION_FOLDERS else [])
    images = ImageFolder(roots, content.folders, content.archives)
    questions = [Question(r.id, r.question, r.answers, images.find(r.image, r.where)) for r in records]
    return QuestionSet(content.format, file.name, questions)


def holds_split(path: Path | str, split: str) -> bool:
    """Whether a path is a directory, or a packaged set, with questions of a split; whatever is wrong with it, loading will say.

    Args:
        path: See `load_questions`.
        split: Likewise.
    """
    try:
        directory = _packaged(str(path)) if str(path).startswith(PACKAGED) else Path(path)
        return directory.is_dir() and bool(_find_file(directory, split))
    except InputError:
        return False


def fingerprint(path: Path | str, split: str | None = None) -> str:
    """Names what a data source holds: questions and answers word by word, images (or their archives) by size and date of change.

    Args:
        path: See `load_questions`.
        split: Likewise.

    Raises:
        InputError: see `load_questions`.
    """
    found = load_questions(path, split)
    digest = hashlib.sha256(found.format.encode())
    for q in found.questions:
        digest.update(repr((q.id, q.question, q.answers, q.image.path.name, q.image.member)).encode())
    for file in sorted({q.image.path for q in found.questions}):
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _packaged(name: str) -> Path:
    root = Path(str(resources.files("infoprune_export"))) / "data"
    half, _, task = name.removeprefix(PACKAGED).rpartition("/")
    known = {f"{prefix}{p.name}": p for prefix, folder in (("", "tiny"), ("val/", "tiny_val")) for p in sorted((root / folder).glob("*/"))}
    key = f"{half}/{task}" if half else task
    if key not in known:
        names = [PACKAGED + k for k in known]
        raise InputError(f"no packaged data set{near(name, names)}", where=name, mend=f"there are {', '.join(names)}")
    return known[key]


def _find_file(directory: Path, split: str | None) -> Path:
    """The questions file of a split in a directory, by its official name; `balanced` before `all`."""
    found: dict[str, Path] = {}
    formats: set[str] = set()
    for folder in QUESTION_FOLDERS:
        for file in sorted((directory / folder).glob("*.json"), key=lambda p: ("_all_" in p.name, p.name)):
            if official := split_of(file.name):
                formats.add(official[0])
                found.setdefault(official[1], file)
    if not found:
        raise InputError(
            "has no questions file with an official name of VQAv2, TextVQA or GQA",
            where=directory,
            mend="expected such as v2_OpenEnded_mscoco_val2014_questions.json, TextVQA_0.5.1_val.json, testdev_balanced_questions.json",
        )
    if len(formats) > 1:
        raise InputError(f"holds questions of {' and '.join(sorted(formats))}", where=directory, mend="give one of the files instead")
    wanted = PREFERRED_SPLITS if split is None else (split,)
    chosen = next((found[name] for name in wanted if name in found), None)
    if chosen is None:
        raise InputError(f"has no split {split or PREFERRED_SPLITS[0]!r}", where=directory, mend=f"there are: {', '.join(sorted(found))}")
    return chosen


def _checked_file(file: Path, split: str | None) -> Path:
    official = split_of(file.name)
    if split is not None and official is not None and official[1] != split:
        raise InputError(f"is the split {official[1]!r}, not {split!r}", where=file, mend="leave the split out or give the other file")
    return file
