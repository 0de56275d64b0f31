"""Which images belong to which split, for each of the three tasks.

Training images come from an endless stream; validation, test and calibration
images from named streams of their own. Easy-VQA keeps its official test split;
its validation images are held out of official train.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tiny_data import easy_shapes, scene_questions, text_images, words
from tiny_data.sample import Sample, stream

TASKS = ("vqa", "text", "gqa")
#: Images per split of the rendered tasks; a smaller set is always a prefix.
RENDERED = {"val": 300, "test": 1000}
#: Questions per rendered evaluation image.
ASKED = 3


def training_sample(task: str, rng: random.Random) -> Sample:
    """Returns one training image of `task`, never the same twice."""
    if task == "vqa":
        return easy_shapes.training_sample(rng)
    if task == "text":
        return text_images.training_sample(rng)
    return scene_questions.training_sample(rng)


def calibration(task: str, count: int, limit: int | None = None) -> Iterator[Sample]:
    """Yields `count` images from the training side, easy-VQA with at most `limit` questions each."""
    if task == "vqa":
        chosen = stream("calibration", "vqa").sample(easy_shapes.image_ids("train"), count)
        for image_id in sorted(chosen):
            yield easy_shapes.sample("train", image_id, limit=limit)
        return
    for index in range(count):
        rng = stream("calibration", task, index)
        if task == "text":
            yield text_images.render(rng, words.pick_seen(rng))
        else:
            yield scene_questions.sample(rng, 6)


def evaluation(task: str, split: str, count: int | None = None, limit: int | None = None) -> Iterator[Sample]:
    """Yields images of `val` or `test`.

    Args:
        task: One of `TASKS`.
        split: `val` or `test`.
        count: Number of images; all if None.
        limit: Questions per easy-VQA image; all if None.
    """
    if task == "vqa":
        ids = list(easy_shapes.image_ids(split))
        stream("order", "vqa", split).shuffle(ids)
        for image_id in ids[:count]:
            yield easy_shapes.sample(split, image_id, limit=limit)
        return
    for index in range(RENDERED[split] if count is None else count):
        rng = stream(split, task, index)
        if task == "text":
            yield text_images.held_out_sample(rng, index, ASKED)
        else:
            yield scene_questions.sample(rng, ASKED)
