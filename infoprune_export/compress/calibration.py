"""Calibration samples put into batches of equal length, in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from infoprune_export.compress.statistics import Batch
from infoprune_export.errors import InputError


@dataclass(frozen=True)
class Sample:
    """One question with its reference answer.

    Attributes:
        prompt_ids: Token ids of the prompt, image tokens expanded, shape [n] int64.
        answer_ids: Token ids of the answer and the end token; may be empty.
        pixel_values: Shape [images, 3, H, W] float32; None for a question without an image.
    """

    prompt_ids: np.ndarray
    answer_ids: np.ndarray
    pixel_values: np.ndarray | None


def fitting(samples: Sequence[Sample], context: int | None, warn: Callable[[str], None]) -> list[Sample]:
    """Leaves out what does not fit into the model's context.

    Args:
        samples: Questions with their answers.
        context: The model's largest number of positions; None where it has no limit.
        warn: Gets a line that says how many were left out.

    Raises:
        InputError: none fits.
    """
    fit = [s for s in samples if context is None or len(s.prompt_ids) + len(s.answer_ids) <= context]
    if samples and not fit:
        raise InputError(f"every calibration question is longer than the model's context of {context} tokens", mend="use shorter ones")
    if left := len(samples) - len(fit):
        warn(f"{left} of {len(samples)} calibration questions are longer than the model's context of {context} tokens and are left out")
    return fit


MOST_SAMPLES, MOST_TOKENS = 16, 2048
"""In one batch: going back, a layer keeps its activations, about 0.4 MB a token at the sizes of LLaVA-1.5-7B."""


def make_batches(samples: Sequence[Sample]) -> list[Batch]:
    """Groups samples of equal length and equal number of images, so many that a backward pass fits into memory.

    The loss is on the answer's tokens; where a sample has no answer, on every text token after the first.
    """
    groups: dict[tuple[int, int], list[Sample]] = {}
    for s in samples:
        images = 0 if s.pixel_values is None else len(s.pixel_values)
        groups.setdefault((len(s.prompt_ids) + len(s.answer_ids), images), []).append(s)
    batches = []
    for (length, images), group in sorted(groups.items()):
        size = min(MOST_SAMPLES, max(1, MOST_TOKENS // length))
        for start in range(0, len(group), size):
            batches.append(_batch(group[start : start + size], images > 0))
    return batches


def _batch(samples: Sequence[Sample], with_images: bool) -> Batch:
    ids = torch.from_numpy(np.stack([np.concatenate([s.prompt_ids, s.answer_ids]) for s in samples]).astype(np.int64))
    targets = torch.full_like(ids, -100)
    for row, s in enumerate(samples):
        first = len(s.prompt_ids) if len(s.answer_ids) else 1
        # Position t predicts token t + 1.
        targets[row, first - 1 : -1] = ids[row, first:]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if with_images:
        inputs["pixel_values"] = torch.from_numpy(np.concatenate([s.pixel_values for s in samples]))
    return Batch(inputs, targets)
