"""The three official question files, told apart by what is in them, each read record by record.

    VQAv2    v2_OpenEnded_mscoco_val2014_questions.json + v2_mscoco_val2014_annotations.json, val2014/ or val2014.zip
    TextVQA  TextVQA_0.5.1_val.json, train_images/ or train_val_images.zip
    GQA      testdev_balanced_questions.json, images/ or images.zip

Images may also lie in `images/` whatever the format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infoprune_export.data.scores import Format
from infoprune_export.errors import InputError

OFFICIAL_NAMES: dict[Format, re.Pattern[str]] = {
    "vqav2": re.compile(r"(?:v2_)?OpenEnded_mscoco_(train|val|test-dev|test)20\d\d_questions\.json"),
    "textvqa": re.compile(r"TextVQA_[\d.]+_(train|val|test)\.json"),
    "gqa": re.compile(r"(train|val|testdev|test|challenge|submission)_(?:balanced|all)_questions\.json"),
}
REFERENCE_ANSWERS = 10
_IN_WORDS = {str: "a string", int: "a whole number", list: "a list"}


@dataclass(frozen=True)
class Record:
    """One question before its image is looked up."""

    id: str
    question: str
    answers: tuple[str, ...]
    image: str
    where: str


@dataclass(frozen=True)
class QuestionFile:
    """A questions file that was read: its format, its records, and where its images may be."""

    format: Format
    records: list[Record]
    folders: tuple[str, ...]
    archives: tuple[str, ...]


def split_of(name: str) -> tuple[Format, str] | None:
    """Format and split (train, val, testdev, test …) that an official file name states."""
    for format, pattern in OFFICIAL_NAMES.items():
        if match := pattern.fullmatch(name):
            return format, match[1].replace("test-dev", "testdev")
    return None


def read_questions(path: Path) -> QuestionFile:
    """Reads one questions file in whichever of the three formats it is.

    Raises:
        InputError: unreadable, malformed (with line) or of no known format; a missing or ill-typed
            field (with record and field).
    """
    data = _load(path)
    if isinstance(data, dict) and isinstance(data.get("questions"), list):
        return _vqav2(path, data)
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        return _textvqa(path, data["data"])
    if isinstance(data, dict) and data and all(isinstance(v, dict) for v in data.values()):
        return _gqa(path, data)
    if isinstance(data, dict) and isinstance(data.get("annotations"), list):
        raise InputError("holds annotations, not questions", where=path, mend="give the questions file that lies beside it")
    raise InputError("is not a VQAv2, TextVQA or GQA questions file", where=path, mend="give one in its official JSON format")


def _load(path: Path) -> Any:
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except json.JSONDecodeError as e:
        raise InputError(f"line {e.lineno}: not JSON ({e.msg})", where=path, mend="fetch the file again") from None
    except UnicodeDecodeError:
        raise InputError("is not a JSON file (not UTF-8 text)", where=path) from None
    except OSError as e:
        raise InputError(f"cannot be read ({e.strerror})", where=path) from None


def _get(record: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A field of a record, checked."""
    if not isinstance(record, dict):
        raise InputError("is not an object with fields", where=where)
    if name not in record:
        raise InputError(f"field {name!r} is missing", where=where)
    value = record[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise InputError(f"field {name!r} is not {' or '.join(_IN_WORDS[k] for k in kinds)}", where=where)
    return value


def _image_name(record: Any, name: str, where: str) -> str:
    value = _get(record, name, str, where)
    if not value or value in (".", "..") or any(c in value for c in "/\\\0"):
        raise InputError(f"field {name!r} is not the name of an image: {value!r}", where=where)
    return value


def _numbered(path: Path, records: list[Any], what: str = "record") -> Iterator[tuple[str, Any]]:
    """Each record with its place for error messages, counted from 1."""
    return ((f"{path}: {what} {n}", record) for n, record in enumerate(records, start=1))


def _ten(answers: list[Any], where: str) -> tuple[str, ...]:
    if len(answers) != REFERENCE_ANSWERS or not all(isinstance(a, str) for a in answers):
        raise InputError(f"field 'answers' does not hold {REFERENCE_ANSWERS} answers", where=where)
    return tuple(answers)


def _vqav2(path: Path, data: dict[str, Any]) -> QuestionFile:
    subtype = data.get("data_subtype") or _subtype_of_name(path)
    if not isinstance(subtype, str) or not re.fullmatch(r"[\w-]+", subtype):
        raise InputError("field 'data_subtype' (such as val2014) is missing", where=path)
    images = subtype.replace("test-dev", "test")
    answers = _vqav2_answers(path)
    records = []
    for where, record in _numbered(path, data["questions"]):
        key = _get(record, "question_id", int, where)
        image = f"COCO_{images}_{_get(record, 'image_id', int, where):012d}"
        if answers is not None and key not in answers:
            raise InputError(f"question_id {key} has no annotation in the annotations file", where=where)
        records.append(Record(str(key), _get(record, "question", str, where), answers[key] if answers else (), image, where))
    return QuestionFile("vqav2", records, (images, "images"), (f"{images}.zip", "images.zip"))


def _subtype_of_name(path: Path) -> str | None:
    match = re.search(r"(train|val|test-dev|test)20\d\d", path.name)
    return match[0] if match else None


def _vqav2_answers(questions: Path) -> dict[int, tuple[str, ...]] | None:
    """Answers by question, or None where there is no annotations file (test splits)."""
    name = questions.name.replace("OpenEnded_", "").replace("questions", "annotations")
    if name == questions.name:
        return None
    folders = (questions.parent, questions.parent.parent / "Annotations", questions.parent.parent / "annotations")
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if path is None:
        return None
    data = _load(path)
    answers = {}
    for where, record in _numbered(path, _get(data, "annotations", list, str(path))):
        key = _get(record, "question_id", int, where)
        listed = _get(record, "answers", list, where)
        answers[key] = _ten([_get(a, "answer", str, f"{where}: answers[{i}]") for i, a in enumerate(listed)], where)
    return answers


def _textvqa(path: Path, data: list[Any]) -> QuestionFile:
    records = []
    for where, record in _numbered(path, data):
        image = _image_name(record, "image_id", where)  # first, for it refuses what is no record
        answers = _ten(_get(record, "answers", list, where), where) if "answers" in record else ()
        if not answers and record.get("set_name") != "test":
            raise InputError("field 'answers' is missing", where=where)
        records.append(
            Record(str(_get(record, "question_id", (int, str), where)), _get(record, "question", str, where), answers, image, where)
        )
    return QuestionFile(
        "textvqa", records, ("train_images", "test_images", "images"), ("train_val_images.zip", "test_images.zip", "images.zip")
    )


def _gqa(path: Path, data: dict[str, Any]) -> QuestionFile:
    records = []
    official = split_of(path.name)
    answered = official is None or official[1] not in ("test", "challenge", "submission")
    for number, (key, record) in enumerate(data.items(), start=1):
        where = f"{path}: record {number} ({key})"
        question, image = _get(record, "question", str, where), _image_name(record, "imageId", where)
        answers = (_get(record, "answer", str, where),) if answered or "answer" in record else ()
        records.append(Record(key, question, answers, image, where))
    return QuestionFile("gqa", records, ("images",), ("images.zip",))
