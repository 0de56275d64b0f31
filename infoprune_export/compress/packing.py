"""All questions of one image in one row behind one shared prefix, so that the image is paid for once.

A row is `[prefix][question 1 + answer 1][question 2 + answer 2]...`: the prefix is what all prompts begin with, the
image's tokens in it. Every question sees the prefix and itself but no other question, and its positions restart
behind the prefix, so its logits are those of a sequence of its own, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""Marks positions without a target."""
LONGEST_ROW = 1024
"""Tokens behind the prefix after which an image gets another row: attention grows with the square."""

Tokens = tuple[np.ndarray, np.ndarray]
"""Token ids of a prompt, image tokens expanded, and of its answer with the end token (may be empty); int64."""


@dataclass(frozen=True, eq=False)
class Row:
    """One image with some questions about it, as one sequence.

    Attributes:
        ids: Token ids, shape [n] int64.
        positions: Position of each token, shape [n].
        owners: Number of the question that a token belongs to, -1 in the prefix, shape [n].
        targets: Token to predict at each position, `IGNORE` where there is no loss, shape [n].
        answered: Whether the targets are answers, and not the text itself for want of one.
        pixels: Makes the image's pixel values, shape [1, 3, H, W] float32; None for a text without an image.
    """

    ids: np.ndarray
    positions: np.ndarray
    owners: np.ndarray
    targets: np.ndarray
    answered: bool
    pixels: Callable[[], np.ndarray] | None


@dataclass(frozen=True)
class Packed:
    """A batch of rows, padded on the right.

    Attributes:
        inputs: Keyword arguments of the model's forward; `attention_mask` [rows, 1, n, n] bool where a row holds
            several questions, else [rows, n] int64.
        targets: Shape [rows, n].
        owners: Shape [rows, n]; numbered through the batch, -1 in the prefix and in padding.
        real: Which positions are no padding, shape [rows, n] bool.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    owners: Tensor
    real: Tensor


def make_rows(
    images: Iterable[tuple[Callable[[], np.ndarray] | None, Sequence[Tokens]]], *, image_token: int | None, window: int | None = None
) -> list[Row]:
    """One row for each image with its questions, or as few as `LONGEST_ROW` allows; none where there is nothing to learn.

    Args:
        images: What makes an image's pixels, and the questions about it.
        image_token: Id of the image token. Where it comes after the prompts' common part, questions stay apart.
        window: Of a decoder with sliding attention. A sequence that it would cut gets a row of its own and no mask of ours.
    """
    rows = []
    for pixels, questions in images:
        cut = window is not None and max(len(prompt) + len(answer) for prompt, answer in questions) > window
        prefix = None if cut or len(questions) == 1 else _common(questions, image_token)
        if prefix is None:
            rows += [_row(pixels, _behind_image(prompt, image_token, answer), [(prompt, answer)]) for prompt, answer in questions]
            continue
        group: list[Tokens] = []
        length = 0
        for prompt, answer in questions:
            own = len(prompt) - prefix + len(answer)
            if group and length + own > LONGEST_ROW:
                rows.append(_row(pixels, prefix, group))
                group, length = [], 0
            group.append((prompt, answer))
            length += own
        rows.append(_row(pixels, prefix, group))
    return [r for r in rows if (r.targets != IGNORE).any()]


def pack(rows: Sequence[Row], pad: int = 0) -> Packed:
    """Puts rows into one batch."""
    longest = max(len(r.ids) for r in rows)
    ids, positions, owners, targets = (np.full((len(rows), longest), fill, np.int64) for fill in (pad, 0, -1, IGNORE))
    real = np.zeros((len(rows), longest), bool)
    asked = 0
    for i, r in enumerate(rows):
        n = len(r.ids)
        ids[i, :n], positions[i, :n], targets[i, :n], real[i, :n] = r.ids, r.positions, r.targets, True
        owners[i, :n] = np.where(r.owners >= 0, r.owners + asked, -1)
        asked += int(r.owners.max()) + 1
    inputs = {"input_ids": torch.from_numpy(ids)}
    if all(r.owners.max() == 0 for r in rows):
        inputs["attention_mask"] = torch.from_numpy(real.astype(np.int64))
    else:
        # A token sees what comes before it in its own question and in the prefix; padding, which nobody sees, too.
        seen = (owners[:, None, :] == owners[:, :, None]) | (owners[:, None, :] == -1)
        seen &= real[:, None, :] & np.tri(longest, dtype=bool)
        seen |= np.eye(longest, dtype=bool)
        inputs |= {"attention_mask": torch.from_numpy(seen[:, None]), "position_ids": torch.from_numpy(positions)}
    pictures = [r.pixels() for r in rows if r.pixels]
    if pictures:
        inputs["pixel_values"] = torch.from_numpy(np.concatenate(pictures))
    return Packed(inputs, torch.from_numpy(targets), torch.from_numpy(owners), torch.from_numpy(real))


def _common(questions: Sequence[Tokens], image_token: int | None) -> int | None:
    """Length of what all prompts begin with, at least one token short of each; None if it does not hold the image."""
    shortest = min(len(prompt) for prompt, _ in questions) - 1
    stack = np.stack([prompt[:shortest] for prompt, _ in questions])
    same = (stack == stack[0]).all(0)
    length = shortest if same.all() else int(same.argmin())
    behind = any(_behind_image(prompt, image_token) > length for prompt, _ in questions)
    return None if behind or length == 0 else length


def _behind_image(prompt: np.ndarray, image_token: int | None, answer: Sequence[int] | np.ndarray = ()) -> int:
    """First position behind the last image token; 1 where there is none, because nothing predicts the first token.

    Before an answer the prompt's last token is left to the question even if it is an image token: it predicts the answer.
    """
    found = np.flatnonzero(prompt == image_token) if image_token is not None else ()
    behind = int(found[-1]) + 1 if len(found) else 1
    return min(behind, len(prompt) - 1) if len(answer) else behind


def _row(pixels: Callable[[], np.ndarray] | None, prefix: int, questions: Sequence[Tokens]) -> Row:
    """Joins questions that share their first `prefix` tokens."""
    head = questions[0][0][:prefix]
    ids, positions, owners, targets = [head], [np.arange(prefix)], [np.full(prefix, -1)], [np.full(prefix, IGNORE)]
    answered = all(len(answer) for _, answer in questions)
    for number, (prompt, answer) in enumerate(questions):
        whole = np.concatenate([prompt, answer])
        own = whole[prefix:]
        target = np.full(len(whole), IGNORE)
        first = len(prompt) if len(answer) else max(prefix, 1)
        target[first - 1 : -1] = whole[first:]
        ids.append(own)
        positions.append(np.arange(prefix, len(whole)))
        owners.append(np.full(len(own), number))
        targets.append(target[prefix:])
    joined = [np.concatenate(parts).astype(np.int64) for parts in (ids, positions, owners, targets)]
    return Row(*joined, answered=answered, pixels=pixels)
