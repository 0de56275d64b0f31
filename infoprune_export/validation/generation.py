"""Greedy continuation of many prompts through an engine, padded on the left into one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from infoprune_export.bundle import DECODER
from infoprune_export.engines.profiles import capacity
from infoprune_export.recipe import Dtype, Workload
from infoprune_export.runtime.session import Session, left_pad, padding_id

if TYPE_CHECKING:
    from infoprune_export.validation.reference import Reference


@dataclass(frozen=True)
class Limits:
    """How much an engine takes at a time.

    Attributes:
        batch: Prompts.
        images: Images.
        tokens: Prompt and continuation together; None for as many as the model has positions.
    """

    batch: int = 16
    images: int = 8
    tokens: int | None = None


AMPLE = Limits()


def limits_of(engine: str, workload: Workload) -> Limits:
    """Limits of an engine built for a workload: TensorRT's profiles hold just that, ONNX Runtime's graphs any shape."""
    if engine == "trt":
        return Limits(workload.batch, max(1, workload.batch * workload.images), capacity(workload))
    return AMPLE


def dtype_of(session: Session) -> Dtype:
    """The type that a session's engines really have."""
    (spec,) = (x for x in session.engines[DECODER].inputs if x.name == "inputs_embeds")
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[spec.dtype.name]


def encode_images(session: Session, pixel_values: np.ndarray, batch: int) -> np.ndarray:
    """Features of every image, [images, tokens, hidden], a few images at a time."""
    return np.concatenate([session.encode_images(pixel_values[i : i + batch]) for i in range(0, len(pixel_values), batch)])


def greedy_logits(session: Session, prompts: Sequence[np.ndarray], features: np.ndarray | None) -> Iterator[np.ndarray]:
    """Logits of one greedy step after another, without end; the caller decides when to stop.

    Args:
        session: The engines.
        prompts: Token ids of each prompt, image tokens repeated.
        features: [images of all prompts in their order, tokens, hidden]; None without images.

    Yields:
        [batch, vocab] float32 after the prompt, then after each token of highest logit.
    """
    ids, mask = left_pad(prompts, padding_id(session.config.image_token_id))
    logits, cache = session.prefill(session.embed(ids, features), mask)
    while True:
        logits = np.asarray(logits, np.float32)
        yield logits
        logits, cache = session.step(logits.argmax(-1).astype(np.int64), cache)


def reference_logits(session: Session, reference: Reference, rows: Sequence[int], features: np.ndarray | None) -> Iterator[np.ndarray]:
    """The same for some of a reference's prompts.

    Args:
        session: The engines.
        reference: With the prompts.
        rows: Which of them.
        features: [images of all its prompts, tokens, hidden]; None without images.
    """
    prompts = [reference.prompts[row] for row in rows]
    images = [p.image for p in prompts if p.image is not None]
    return greedy_logits(session, [p.input_ids for p in prompts], features[images] if images else None)


def continue_greedily(
    session: Session, prompts: Sequence[np.ndarray], features: np.ndarray | None, max_new_tokens: int, eos_ids: Sequence[int]
) -> list[np.ndarray]:
    """Greedy continuation of each prompt, cut before its first end-of-sequence token.

    Args:
        session: The engines; their model's config says how long a sequence may be.
        prompts: Token ids of each prompt, image tokens repeated.
        features: [images of all prompts in their order, tokens, hidden]; None without images.
        max_new_tokens: Where a continuation is cut.
        eos_ids: Tokens that end one.

    Returns:
        Token ids of each continuation, int64 [<= max_new_tokens].
    """
    limit = session.config.max_positions
    if limit is not None:
        max_new_tokens = min(max_new_tokens, limit - max(len(p) for p in prompts) + 1)
    rows: list[np.ndarray] = []
    done = np.zeros(len(prompts), bool)
    for logits in greedy_logits(session, prompts, features):
        rows.append(logits.argmax(-1))
        done |= np.isin(rows[-1], eos_ids)
        if done.all() or len(rows) >= max_new_tokens:
            break
    return [cut_at(tokens, eos_ids) for tokens in np.stack(rows, axis=1)]


def cut_at(tokens: np.ndarray, eos_ids: Sequence[int]) -> np.ndarray:
    """The tokens before the first end of sequence."""
    ends = np.flatnonzero(np.isin(tokens, eos_ids))
    return tokens[: ends[0]] if len(ends) else tokens
