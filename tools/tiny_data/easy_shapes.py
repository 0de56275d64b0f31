"""The easy-VQA images and questions, with validation images held out of train."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache

import numpy as np
from PIL import Image

from infoprune_export.errors import MissingRequirement
from tiny_data.sample import COLOR_ID, HEAD_INDEX, SHAPE_ID, Question, Sample, empty_labels, stream

#: Official train images that are never trained on.
VALIDATION_IMAGES = 200
_FLIPS = tuple(Image.Transpose)


def _kind(question: str, answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPE_ID else "color"


@cache
def _official(split: str) -> tuple[dict[int, list[Question]], dict[int, str]]:
    try:
        import easy_vqa
    except ImportError:
        raise MissingRequirement("easy-VQA needs the package easy-vqa", mend='pip install "infoprune-export[train]"') from None

    texts, answers, images = getattr(easy_vqa, f"get_{split}_questions")()
    by_image: dict[int, list[Question]] = defaultdict(list)
    for text, answer, image in zip(texts, answers, images, strict=True):
        by_image[image].append(Question(text, answer, _kind(text, answer)))
    return dict(by_image), getattr(easy_vqa, f"get_{split}_image_paths")()


@cache
def image_ids(split: str) -> tuple[int, ...]:
    """Returns the image ids of `train`, `val` (from official train) or `test`."""
    if split == "test":
        return tuple(sorted(_official("test")[0]))
    ids = sorted(_official("train")[0])
    held_out = set(stream("easy-vqa", "validation").sample(ids, VALIDATION_IMAGES))
    return tuple(i for i in ids if (i in held_out) == (split == "val"))


@cache
def _answer_weights() -> dict[tuple[str, str], float]:
    """Inverse answer frequency per question string, over train.

    "Is a red shape present?" is `no` seven times in eight; unweighted, a model
    learns the frequent answer first and stays there for long.
    """
    by_image, _ = _official("train")
    counts: dict[str, Counter] = defaultdict(Counter)
    for image in image_ids("train"):
        for question in by_image[image]:
            counts[question.text][question.answer] += 1
    return {
        (text, answer): sum(answers.values()) / (len(answers) * count)
        for text, answers in counts.items()
        for answer, count in answers.items()
    }


@cache
def _pixels(split: str, image_id: int) -> Image.Image:
    official = "test" if split == "test" else "train"
    with Image.open(_official(official)[1][image_id]) as image:
        return image.convert("RGB")


def _patch_labels(image: Image.Image, questions: list[Question]) -> np.ndarray:
    """Labels the patches of the one shape from what the questions give away."""
    labels = empty_labels()
    labels[:, HEAD_INDEX["letter"]] = 0
    shape = next((q.answer for q in questions if q.answer in SHAPE_ID), None)
    color = next((q.answer for q in questions if q.answer in COLOR_ID), None)
    pixels = np.asarray(image, dtype=np.int16)
    # The background is whatever most of the border shows.
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    shown = np.abs(pixels - np.median(border, axis=0)).max(-1) > 24
    covered = shown.reshape(8, 8, 8, 8).sum((1, 3)).reshape(-1)
    labels[covered == 0, HEAD_INDEX["shape"]] = 0
    if shape:
        labels[covered >= 12, HEAD_INDEX["shape"]] = SHAPE_ID[shape]
    if color:
        labels[covered >= 12, HEAD_INDEX["color"]] = COLOR_ID[color]
    return labels


def sample(split: str, image_id: int, rng: random.Random | None = None, limit: int | None = None) -> Sample:
    """Returns one official image with its questions.

    Args:
        split: `train`, `val` or `test`.
        image_id: The official id.
        rng: If given, the image is flipped or turned at random (no question asks
            for a place or a direction) and answers get their training weights.
        limit: At most this many questions, drawn with `rng`'s fixed twin.
    """
    questions = _official("test" if split == "test" else "train")[0][image_id]
    image = _pixels(split, image_id)
    if limit is not None and len(questions) > limit:
        questions = stream("easy-vqa", "limit", split, image_id).sample(questions, limit)
    labels_from = _official("test" if split == "test" else "train")[0][image_id]
    if rng is not None:
        turn = rng.randint(0, len(_FLIPS))
        if turn:
            image = image.transpose(_FLIPS[turn - 1])
        weights = _answer_weights()
        questions = [replace(q, weight=weights[q.text, q.answer]) for q in questions]
    return Sample(image, questions, _patch_labels(image, labels_from), {"image_id": image_id})


def training_sample(rng: random.Random) -> Sample:
    """Returns a random training image, randomly turned."""
    return sample("train", rng.choice(image_ids("train")), rng)
