"""Export error: an engine against the same network in PyTorch, on identical inputs; for quantised weights, see `quantisation`.

A difference is judged relative to the largest absolute value of the reference (an element-wise relative error
explodes at elements near zero) and by the smallest cosine similarity of any row, so that one broken token does not
drown among good ones. Rounding differs with the order of additions, which every kernel chooses for itself:

    dtype  max |diff| / max |reference|  cosine
    fp32   1e-4                          0.99999
    fp16   1e-2                          0.999
    bf16   8e-2                          0.99

Engines with quantised weights round the inputs of every product to int8 as well, block by block: 5e-2 and 0.99.

Greedy generation in fp32 has to give PyTorch's token ids on every prompt. In half precision a continuation may part
from PyTorch's at a near-tie: where the engine's own logits of its token and of PyTorch's token differ by no more than
both could be off within the tolerance (2 x tolerance x the row's largest absolute logit). What follows a near-tie is
another text and is not compared; a continuation that parts anywhere else fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from infoprune_export.bundle import DECODER, EMBED, VISION
from infoprune_export.precision import quantised
from infoprune_export.validation.generation import AMPLE, Limits, encode_images, reference_logits
from infoprune_export.validation.records import ComponentNumerics, GenerationNumerics
from infoprune_export.validation.reference import text_tokens

if TYPE_CHECKING:
    from infoprune_export.runtime.session import Session
    from infoprune_export.validation.reference import Reference

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Tolerance:
    """Largest error relative to the reference's largest value, smallest cosine similarity of a row."""

    max_rel: float
    cosine: float


TOLERANCES = {"fp32": Tolerance(1e-4, 0.99999), "fp16": Tolerance(1e-2, 0.999), "bf16": Tolerance(8e-2, 0.99)}
TOLERANCES |= {quantised(dtype, weights): Tolerance(5e-2, 0.99) for dtype in ("fp32", "fp16", "bf16") for weights in ("int8", "int4")}


NO_PROMPT = "the reference holds no prompt that fits the engine"


def check(
    session: Session, reference: Reference, *, engine: str, dtype: str, limits: Limits = AMPLE, notify: Notify = lambda line: None
) -> dict[str, ComponentNumerics | GenerationNumerics]:
    """Holds every component of one engine, and its greedy continuations, against the reference.

    Args:
        session: The engines of the compressed network.
        reference: Inputs and outputs of that network in float arithmetic.
        engine: Name of the engine, for the record.
        dtype: Precision of its graphs: `fp32`, `fp16`, `bf16`, `q4`, ...
        limits: Of the engine; prompts that do not fit are left out and not counted.
        notify: Gets a line per check, such as `PASSED | vision_encoder (ort, fp32) | max |diff| 2.1e-06 ...`.

    Returns:
        `vision_encoder`, `embed_tokens`, `decoder_model_merged` and `generation` to their records.
    """
    features = encode_images(session, reference.pixel_values, limits.images) if len(reference.pixel_values) else None
    records: dict[str, ComponentNumerics | GenerationNumerics] = {}
    if features is not None:
        records[VISION] = compare(VISION, features[: len(reference.image_features)], reference.image_features, engine, dtype)
        notify(describe(VISION, records[VISION]))
    known = text_tokens(reference.prompts[: len(reference.logits)], reference.image_token_id)
    # A few at a time: an engine built for short prompts takes no more tokens than those have.
    embeds = np.concatenate([session.embed(known[None, i : i + 32])[0] for i in range(0, len(known), 32)])
    records[EMBED] = compare(EMBED, embeds, reference.inputs_embeds, engine, dtype)
    notify(describe(EMBED, records[EMBED]))
    rows = [i for i in range(len(reference.logits)) if limits.tokens is None or len(reference.prompts[i].input_ids) <= limits.tokens]
    # One prompt at a time here, batches below: a fault of the padding shows in one and not in the other.
    logits = [next(reference_logits(session, reference, [row], features))[0] for row in rows]
    if rows:
        records[DECODER] = compare(DECODER, np.array(logits), reference.logits[rows], engine, dtype)
    else:
        records[DECODER] = unmeasured(engine, dtype, f"{DECODER} ({engine}, {dtype}): {NO_PROMPT}")
    notify(describe(DECODER, records[DECODER]))
    records["generation"] = compare_generation(session, reference, features, engine=engine, dtype=dtype, limits=limits)
    notify(describe("generation", records["generation"]))
    return records


def compare(component: str, actual: np.ndarray, expected: np.ndarray, engine: str, dtype: str) -> ComponentNumerics:
    """One output against its reference; a NaN or an infinity never passes.

    Args:
        component: Named in the message.
        actual: Of the engine, any float type.
        expected: Of PyTorch, the same shape.
        engine: Name of the engine.
        dtype: Type of its graphs, which chooses the tolerance.
    """
    name, tolerance = f"{component} ({engine}, {dtype})", TOLERANCES[dtype]

    def failed(message: str) -> ComponentNumerics:
        return unmeasured(engine, dtype, f"{name}: {message}")

    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        return failed(f"shape {list(actual.shape)} instead of {list(expected.shape)}")
    if not expected.size:
        return failed("the reference holds no values")
    for whose, values in (("engine", actual), ("reference", expected)):
        if bad := int(np.count_nonzero(~np.isfinite(values))):
            return failed(f"{bad:,} of {values.size:,} values of the {whose} are NaN or infinite")
    max_abs, max_rel, cosine = closeness(actual, expected)
    passed = max_rel <= tolerance.max_rel and cosine >= tolerance.cosine
    message = None if passed else f"{name}: allowed are max_rel {tolerance.max_rel:g} and cosine {tolerance.cosine:g}"
    return ComponentNumerics(engine=engine, dtype=dtype, max_abs=max_abs, max_rel=max_rel, cosine=cosine, passed=passed, message=message)


def unmeasured(engine: str, dtype: str, message: str | None = None) -> ComponentNumerics:
    """The record of a component that failed before there was anything to compare."""
    return ComponentNumerics(engine=engine, dtype=dtype, max_abs=None, max_rel=None, cosine=None, passed=False, message=message)


def closeness(actual: np.ndarray, expected: np.ndarray) -> tuple[float, float, float]:
    """Largest absolute difference, the same over the largest absolute value expected, and the smallest cosine of any row."""
    max_abs = float(np.abs(actual - expected).max())
    scale = float(np.abs(expected).max())
    max_rel = max_abs / scale if scale else (0.0 if max_abs == 0 else float(np.finfo(np.float32).max))
    return max_abs, max_rel, _smallest_cosine(actual, expected)


def compare_generation(
    session: Session, reference: Reference, features: np.ndarray | None, *, engine: str, dtype: str, limits: Limits = AMPLE
) -> GenerationNumerics:
    """Greedy continuations against the reference's, by the rule at the top of this module."""
    lengths = {i: len(prompt.input_ids) for i, prompt in enumerate(reference.prompts)}
    fitting = [i for i, n in lengths.items() if limits.tokens is None or n + reference.max_new_tokens <= limits.tokens]
    order = sorted(fitting, key=lengths.__getitem__)
    identical = ties = 0
    faults: list[str] = []
    for start in range(0, len(order), limits.batch):
        rows = order[start : start + limits.batch]
        for row, parted in zip(rows, _where_parted(session, reference, rows, features), strict=True):
            if parted is None:
                identical += 1
            elif dtype != "fp32" and parted.is_near_tie(TOLERANCES[dtype]):
                ties += 1
            else:
                faults.append(f"prompt {row} {parted}")
    message = None if order else f"generation ({engine}, {dtype}): {NO_PROMPT}"
    if faults:
        more = f" (and {len(faults) - 1} more prompts)" if faults[1:] else ""
        message = f"generation ({engine}, {dtype}): {faults[0]}{more}"
    return GenerationNumerics(
        engine=engine,
        dtype=dtype,
        prompts=len(order),
        identical_token_ids=identical,
        near_ties=ties,
        passed=bool(order) and not faults,
        message=message,
    )


@dataclass(frozen=True)
class Parted:
    """Where a continuation left the reference's: at which token, for which, and by what margin of its own logits."""

    step: int
    token: int
    expected: int
    margin: float
    scale: float

    def is_near_tie(self, tolerance: Tolerance) -> bool:
        return bool(np.isfinite(self.margin)) and self.margin <= 2 * tolerance.max_rel * self.scale

    def __str__(self) -> str:
        if not np.isfinite(self.scale):
            return f"has NaN or infinite logits at new token {self.step + 1}"
        return f"parts at new token {self.step + 1}: {self.token} instead of {self.expected}, its logit higher by {self.margin:.3g}"


def _where_parted(session: Session, reference: Reference, rows: Sequence[int], features: np.ndarray | None) -> list[Parted | None]:
    """For each prompt of a batch, where its continuation parts from the reference's (None: nowhere)."""
    wanted = [reference.generated[row] for row in rows]
    parted: dict[int, Parted] = {}
    for step, logits in enumerate(reference_logits(session, reference, rows, features)):
        for i, tokens in enumerate(wanted):
            if i in parted or step >= len(tokens):
                continue
            chosen, expected, row = int(logits[i].argmax()), int(tokens[step]), logits[i]
            # A NaN row has an argmax too, and it may happen to be the right token.
            if chosen != expected or not np.isfinite(row).all():
                parted[i] = Parted(step, chosen, expected, float(row[chosen] - row[expected]), float(np.abs(row).max()))
        if all(i in parted or step + 1 >= len(tokens) for i, tokens in enumerate(wanted)):
            break
    return [parted.get(i) for i in range(len(rows))]


def _smallest_cosine(actual: np.ndarray, expected: np.ndarray) -> float:
    a, b = (x.reshape(-1, x.shape[-1]) for x in (actual, expected))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    products = np.einsum("ij,ij->i", a, b)
    # Two rows of zeros agree; a row of zeros against anything else does not.
    agree = np.where(norms > 0, products / np.where(norms > 0, norms, 1), np.all(a == b, axis=1))
    return float(min(agree.min(), 1.0))


def describe(component: str, record: ComponentNumerics | GenerationNumerics) -> str:
    """One line for a person, in the manner of Polygraphy's comparisons."""
    head = f"{'PASSED' if record.passed else 'FAILED'} | {component} ({record.engine}, {record.dtype})"
    if isinstance(record, GenerationNumerics):
        ties = f", {record.near_ties} part at a near-tie" if record.near_ties else ""
        figures = f"{record.identical_token_ids} of {record.prompts} prompts with identical token ids{ties}"
    elif record.max_abs is None:
        return f"{head} | {record.message}"
    else:
        figures = f"max |diff| {record.max_abs:.1e}, relative {record.max_rel:.1e}, cosine {record.cosine:.7f}"
    return f"{head} | {figures}" + (f" | {record.message}" if record.message else "")
