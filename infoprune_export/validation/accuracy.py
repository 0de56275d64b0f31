"""What a task's questions are answered through an exported engine, and the official score of the answers.

Every distinct image is encoded once, a window of images at a time so that memory does not grow with the set;
the questions of a window are answered greedily in batches of similar length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from infoprune_export.validation.generation import AMPLE, Limits, continue_greedily, encode_images
from infoprune_export.validation.records import Accuracy, Interval

if TYPE_CHECKING:
    from infoprune_export.runtime.session import Session

Z95 = 1.959963984540054
"""Two-sided 95% of the normal distribution."""
IMAGES_AT_A_TIME = 32


@dataclass(frozen=True)
class Example:
    """One question as a session takes it: its image (anything hashable that names it) and its prompt's token ids."""

    image: Hashable
    input_ids: np.ndarray


def answer(
    session: Session,
    examples: Sequence[Example],
    load_image: Callable[[Hashable], np.ndarray],
    eos_ids: Sequence[int],
    *,
    max_new_tokens: int = 16,
    limits: Limits = AMPLE,
    progress: Callable[[int], None] = lambda done: None,
) -> list[np.ndarray]:
    """Greedy answers to questions about images.

    Args:
        session: The engines.
        examples: The questions.
        load_image: An example's image to pixel values [1, channels, height, width] float32.
        eos_ids: Tokens that end an answer.
        max_new_tokens: Where an answer is cut.
        limits: Questions answered and images encoded at a time.
        progress: Gets the number of questions just answered.

    Returns:
        Token ids of each answer, without the end of sequence, in the order of `examples`.
    """
    numbers = {image: i for i, image in enumerate(dict.fromkeys(e.image for e in examples))}
    order = sorted(range(len(examples)), key=lambda i: numbers[examples[i].image])
    answers: list[np.ndarray] = [np.zeros(0, np.int64)] * len(examples)
    for _, members in groupby(order, key=lambda i: numbers[examples[i].image] // IMAGES_AT_A_TIME):
        window = sorted(members, key=lambda i: len(examples[i].input_ids))
        row_of = {image: row for row, image in enumerate(dict.fromkeys(examples[i].image for i in window))}
        features = encode_images(session, np.concatenate([load_image(image) for image in row_of]), limits.images)
        for start in range(0, len(window), limits.batch):
            rows = window[start : start + limits.batch]
            texts = continue_greedily(
                session,
                [examples[i].input_ids for i in rows],
                features[[row_of[examples[i].image] for i in rows]],
                max_new_tokens,
                eos_ids,
            )
            for i, tokens in zip(rows, texts, strict=True):
                answers[i] = tokens
            progress(len(rows))
    return answers


def wilson(mean: float, n: int, z: float = Z95) -> Interval:
    """Wilson's score interval of a mean of n scores between 0 and 1.

    Exact in form for scores of 0 and 1; for scores between (VQA accuracy grades agreement with ten people) it is
    too wide rather than too narrow, since no such scores of one mean vary more than zeros and ones.
    """
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return Interval(low=max(0.0, centre - half), high=min(1.0, centre + half))


def paired_drop(original: Sequence[float], compressed: Sequence[float], z: float = Z95) -> tuple[float, Interval]:
    """Loss of accuracy in points, with the interval of the paired difference.

    Pairing takes out what the two have in common: which questions are hard. The interval is Bonett and Price's (2012):
    one further question lost and one won before the normal approximation, so that it does not shrink to nothing where
    both networks answer alike.
    """
    lost = np.asarray(original, np.float64) - np.asarray(compressed, np.float64)
    more = np.append(lost, (1.0, -1.0))
    half = z * math.sqrt(more.var() / len(more))
    low, high = max(-1.0, more.mean() - half), min(1.0, more.mean() + half)
    return 100 * float(lost.mean()), Interval(low=100 * low, high=100 * high)


def describe(record: Accuracy) -> str:
    """One line for a person."""
    before = f"{record.original:.3f} to " if record.original is not None else ""
    quantised = f", quantised {record.quantised:.3f}" if record.quantised is not None else ""
    return f"{before}{record.compressed:.3f}{quantised}, {record.n} questions, {record.metric}"


def record(
    original: Sequence[float] | None,
    compressed: Sequence[float],
    quantised: Sequence[float] | None = None,
    *,
    metric: str,
    engine: str,
    dtype: str,
) -> Accuracy:
    """The report's entry for one task, from the score of every question.

    Args:
        original: Scores of the original network; None where it is not at hand.
        compressed: Scores of the compressed network on the same questions.
        quantised: Scores of the compressed network with quantised weights; None where there is none.
        metric: Name of the official score.
        engine: Engine that answered.
        dtype: Type of its graphs.
    """
    n, after = len(compressed), float(np.mean(compressed))
    made = Accuracy(original=None, compressed=after, n=n, metric=metric, engine=engine, dtype=dtype, compressed_interval=wilson(after, n))
    if quantised is not None:
        made.quantised = float(np.mean(quantised))
        made.quantised_interval = wilson(made.quantised, n)
    if original is not None:
        made.original = float(np.mean(original))
        made.original_interval = wilson(made.original, n)
        made.drop_points, made.drop_points_interval = paired_drop(original, compressed)
        if quantised is not None:
            made.quantised_drop_points, made.quantised_drop_points_interval = paired_drop(original, quantised)
    return made
