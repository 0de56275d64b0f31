"""Writes samples in the official file formats of VQAv2, TextVQA and GQA.

Names, folders and fields are those of the real releases (images are PNG where
COCO has JPEG), so one loader reads both. Every question carries ten identical
reference answers where the format has ten.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from tiny_data.sample import Question, Sample

# Fixed, so that the same pictures give the same bytes on any day.
_EPOCH = (1980, 1, 1, 0, 0, 0)
_LICENSE = {"name": "MIT", "url": "https://github.com/vzhou842/easy-VQA"}


def png(image: Image.Image) -> bytes:
    """Returns the image as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    """Writes a zip whose bytes depend on its members alone."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system = 3
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, members[name])


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")


def _answer_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if answer.isdigit() else "other"


def write_vqa(folder: Path, subtype: str, samples: Iterable[Sample]) -> None:
    """Writes VQAv2 questions, annotations and images of `train2014` or `val2014`."""
    questions, annotations, images = [], [], {}
    for sample in samples:
        image_id = sample.info["image_id"]
        images[f"{subtype}/COCO_{subtype}_{image_id:012d}.png"] = png(sample.image)
        for number, question in enumerate(sample.questions):
            ids = {"image_id": image_id, "question_id": image_id * 1000 + number}
            questions.append({**ids, "question": question.text})
            annotations.append(
                {
                    **ids,
                    "question_type": " ".join(question.text.rstrip("?").split()[:3]),
                    "answer_type": _answer_type(question.answer),
                    "multiple_choice_answer": question.answer,
                    "answers": [{"answer": question.answer, "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)],
                }
            )
    head = {
        "info": {"description": "easy-VQA in the VQA v2 format", "version": "1.0"},
        "license": _LICENSE,
        "data_type": "mscoco",
        "data_subtype": subtype,
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(
        folder / f"v2_OpenEnded_mscoco_{subtype}_questions.json",
        {**head, "task_type": "Open-Ended", "questions": questions},
    )
    _write_json(folder / f"v2_mscoco_{subtype}_annotations.json", {**head, "annotations": annotations})
    write_zip(folder / f"{subtype}.zip", images)


def write_textvqa(folder: Path, splits: dict[str, Iterable[Sample]]) -> None:
    """Writes TextVQA questions per split (`train`, `val`) and their one image archive."""
    images = {}
    folder.mkdir(parents=True, exist_ok=True)
    for split, samples in splits.items():
        data = []
        first = 0 if split == "train" else 34602
        for sample in samples:
            content = png(sample.image)
            image_id = hashlib.sha256(content).hexdigest()[:16]
            images[f"train_images/{image_id}.png"] = content
            for question in sample.questions:
                data.append(
                    {
                        "question": question.text,
                        "image_id": image_id,
                        "image_classes": [],
                        "flickr_original_url": "",
                        "image_width": sample.image.width,
                        "image_height": sample.image.height,
                        "answers": [question.answer] * 10,
                        "question_id": first + len(data),
                        "set_name": split,
                    }
                )
        _write_json(
            folder / f"TextVQA_0.5.1_{split}.json",
            {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data},
        )
    write_zip(folder / "train_val_images.zip", images)


_STRUCTURE = {
    "relate color": ("query", "rel"),
    "relate shape": ("query", "rel"),
    "relate size": ("query", "rel"),
    "relate verify": ("verify", "rel"),
    "relate count": ("query", "rel"),
    "compare place": ("verify", "rel"),
    "count": ("query", "obj"),
    "exist": ("verify", "obj"),
    "choose size": ("choose", "attr"),
}


def _full_answer(question: Question) -> str:
    if question.answer in ("yes", "no"):
        return question.answer.capitalize() + "."
    return f"There are {question.answer}." if question.answer.isdigit() else f"It is {question.answer}."


def write_gqa(folder: Path, splits: dict[str, Iterable[Sample]]) -> None:
    """Writes GQA questions per split (`train`, `testdev`) and their one image archive."""
    images = {}
    folder.mkdir(parents=True, exist_ok=True)
    for split, samples in splits.items():
        content = {}
        for index, sample in enumerate(samples):
            image_id = f"{2400000 + index}" if split == "train" else f"n{100000 + index}"
            images[f"images/{image_id}.png"] = png(sample.image)
            for question in sample.questions:
                structural, semantic = _STRUCTURE[question.kind]
                first = "01" if split == "train" else "20"
                number = f"{first}{len(content):07d}"
                content[number] = {
                    "question": question.text,
                    "imageId": image_id,
                    "answer": question.answer,
                    "fullAnswer": _full_answer(question),
                    "isBalanced": True,
                    "types": {"structural": structural, "semantic": semantic, "detailed": question.kind},
                    "groups": {"global": None, "local": None},
                }
        _write_json(folder / f"{split}_balanced_questions.json", content)
    write_zip(folder / "images.zip", images)
