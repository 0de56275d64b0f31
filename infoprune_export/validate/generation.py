"""Greedy continuation of many prompts through an engine, padded on the left into one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from infoprune_export.runtime.session import Session


def left_pad(prompts: Sequence[np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask of a batch.

    Args:
        prompts: Token ids of each prompt, [sequence].
        pad_id: What fills the left; its embedding is masked out, so any token but an image's will do.

    Returns:
        input_ids and attention_mask, both [batch, longest] int64.
    """
    longest = max(len(p) for p in prompts)
    ids = np.full((len(prompts), longest), pad_id, np.int64)
    mask = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def pad_id(image_token_id: int | None) -> int:
    """A token id for padding that is not the image's."""
    return 1 if image_token_id == 0 else 0


def encode_images(session: Session, pixel_values: np.ndarray, batch: int = 8) -> np.ndarray:
    """Features of every image, [images, tokens, hidden], a few images at a time."""
    return np.concatenate([session.encode_images(pixel_values[i : i + batch]) for i in range(0, len(pixel_values), batch)])


def greedy_logits(
    session: Session, prompts: Sequence[np.ndarray], features: np.ndarray | None, image_token_id: int | None
) -> Iterator[np.ndarray]:
    """Logits of one greedy step after another, without end; the caller decides when to stop.

    Args:
        session: The engines.
        prompts: Token ids of each prompt, image tokens repeated.
        features: [images of all prompts in their order, tokens, hidden]; None without images.
        image_token_id: Token whose embeddings are image features.

    Yields:
        [batch, vocab] float32 after the prompt, then after each token of highest logit.
    """
    ids, mask = left_pad(prompts, pad_id(image_token_id))
    logits, cache = session.prefill(session.embed(ids, features), mask)
    while True:
        logits = np.asarray(logits, np.float32)
        yield logits
        logits, cache = session.step(logits.argmax(-1).astype(np.int64), cache)


def continue_greedily(
    session: Session,
    prompts: Sequence[np.ndarray],
    features: np.ndarray | None,
    *,
    image_token_id: int | None,
    max_new_tokens: int,
    eos_ids: Sequence[int],
) -> list[np.ndarray]:
    """Greedy continuation of each prompt, cut before its first end-of-sequence token.

    Returns:
        Token ids of each continuation, int64 [<= max_new_tokens].
    """
    rows: list[np.ndarray] = []
    done = np.zeros(len(prompts), bool)
    for logits in greedy_logits(session, prompts, features, image_token_id):
        rows.append(logits.argmax(-1))
        done |= np.isin(rows[-1], eos_ids)
        if done.all() or len(rows) == max_new_tokens:
            break
    return [cut_at(tokens, eos_ids) for tokens in np.stack(rows, axis=1)]


def cut_at(tokens: np.ndarray, eos_ids: Sequence[int]) -> np.ndarray:
    """The tokens before the first end of sequence."""
    ends = np.flatnonzero(np.isin(tokens, eos_ids))
    return tokens[: ends[0]] if len(ends) else tokens
