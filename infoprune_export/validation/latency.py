"""How long the parts of a request take, original and compressed in turn in one run.

Interleaving (A B A B ...) lets both sides see the same machine: its clock, its neighbours, its caches. The parts are

    vision       images to projected image features (the graph holds tower and projector)
    prefill      embedded prompt to the first token's logits
    decode       one further token; each step of the workload is one sample, so the past grows as in use
    end_to_end   pixel values and token ids to the workload's last token, greedy, stopped by nothing

Inputs are random but valid: normal pixel values, token ids of the vocabulary, as many image tokens as the model makes.
Values do not change the time of dense matrix products, shapes do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from infoprune_export.errors import InputError
from infoprune_export.recipe import Workload
from infoprune_export.runtime.session import padding_id
from infoprune_export.validation.records import PartLatency, Timing

if TYPE_CHECKING:
    from infoprune_export.models.anatomy import Anatomy
    from infoprune_export.plans import Plan
    from infoprune_export.runtime.session import Cache, Session

ORIGINAL, COMPRESSED, QUANTISED = "original", "compressed", "quantised"
WARMUP_ROUNDS = 3  # on the third, a TensorRT engine records what it replays from then on
MAX_SAMPLES = 2000

Sample = Callable[[], float]
"""Runs once and says how many milliseconds that took; what it prepares before is not in the time."""


@dataclass(frozen=True)
class Inputs:
    """One request of a workload.

    Attributes:
        pixel_values: [batch * images, channels, height, width] float32; None without images.
        input_ids: Of each prompt of the batch, [prompt tokens] int64.
    """

    pixel_values: np.ndarray | None
    input_ids: list[np.ndarray]


def random_inputs(anatomy: Anatomy, workload: Workload, image_token_id: int | None, seed: int = 0) -> Inputs:
    """A random but valid request.

    Raises:
        InputError: the workload's image tokens are not the model's.
    """
    geometry = anatomy.geometry
    if workload.images and workload.image_tokens != geometry.image_tokens:
        raise InputError(
            f"{workload.image_tokens} image tokens, but this model makes {geometry.image_tokens} of an image",
            where="workload.image_tokens",
            mend=f"write image_tokens: {geometry.image_tokens}",
        )
    rng = np.random.default_rng(seed)
    pixels = None
    if workload.images:
        shape = (workload.batch * workload.images, geometry.channels, geometry.image_size, geometry.image_size)
        pixels = rng.standard_normal(shape, dtype=np.float32)
    text = rng.integers(0, anatomy.vocab_size, (workload.batch, workload.text_tokens), dtype=np.int64)
    if image_token_id is not None:
        text[text == image_token_id] = padding_id(image_token_id)
    images = np.full(workload.images * workload.image_tokens, -1 if image_token_id is None else image_token_id, np.int64)
    return Inputs(pixels, [np.concatenate([row[:1], images, row[1:]]) for row in text])


def timing(milliseconds: Sequence[float]) -> Timing:
    """Order statistics of samples; percentiles interpolate linearly between neighbours."""
    values = np.asarray(milliseconds, np.float64)
    median, p90, p95, p99 = np.percentile(values, [50, 90, 95, 99])
    return Timing(
        median_ms=float(median),
        p90_ms=float(p90),
        p95_ms=float(p95),
        p99_ms=float(p99),
        mean_ms=float(values.mean()),
        min_ms=float(values.min()),
        max_ms=float(values.max()),
        n=len(values),
    )


def interleave(
    sides: Mapping[str, Sample],
    *,
    seconds: float,
    warmup_rounds: int = WARMUP_ROUNDS,
    min_rounds: int = 3,
    max_rounds: int = MAX_SAMPLES,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Samples every side in turn until the time is up, every other round from the last to the first.

    What comes after what can matter by some percent, and turning round evens that out.

    Args:
        sides: Name to what is measured.
        seconds: Wall-clock time for all of it, warm-up and preparation included; the round under way is finished.
        warmup_rounds: Rounds that are run first and not counted.
        min_rounds: Rounds that are counted even when the time is up.
        max_rounds: No more than this.
        clock: Seconds, for the bound only.

    Returns:
        Name to milliseconds, equally many for every side.
    """
    end = clock() + seconds
    for _ in range(warmup_rounds):
        for sample in sides.values():
            sample()
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for done in range(max_rounds):
        if done >= min_rounds and clock() >= end:
            break
        for name in list(sides)[:: -1 if done % 2 else 1]:
            samples[name].append(sides[name]())
    return samples


def part_samples(session: Session, inputs: Inputs, new_tokens: int) -> dict[str, Sample]:
    """What is measured of one side, by part; parts that the workload does not have are left out."""
    features = session.encode_images(inputs.pixel_values) if inputs.pixel_values is not None else None
    ids = np.stack(inputs.input_ids)
    mask = np.ones_like(ids)
    embeds = session.embed(ids, features)
    parts = {}
    if inputs.pixel_values is not None:
        parts["vision"] = timed(lambda: session.encode_images(inputs.pixel_values))
    parts["prefill"] = timed(lambda: session.prefill(embeds, mask))
    if new_tokens > 1:
        parts["decode"] = _DecodeSteps(session, embeds, mask, new_tokens - 1)
    parts["end_to_end"] = timed(lambda: _exhaust(session.generate(inputs.input_ids, inputs.pixel_values, new_tokens, ())))
    return parts


class _DecodeSteps:
    """Times one decode step per call; after the workload's last step it starts again from the prompt's cache."""

    def __init__(self, session: Session, embeds: np.ndarray, mask: np.ndarray, steps: int):
        self.session, self.prompt, self.steps = session, (embeds, mask), steps
        self.done = steps

    @cached_property
    def start(self) -> tuple[np.ndarray, Cache]:
        """The first token, and the prompt's cache."""
        embeds, mask = self.prompt
        logits, cache = self.session.prefill(embeds, mask, mask.shape[1] + self.steps)
        return logits.argmax(-1), cache

    def __call__(self) -> float:
        if self.done == self.steps:
            self.now, self.done = self.start, 0
        start = time.perf_counter_ns()
        logits, cache = self.session.step(*self.now)
        elapsed = (time.perf_counter_ns() - start) / 1e6
        self.now, self.done = (logits.argmax(-1), cache), self.done + 1
        return elapsed


def measure(
    compressed: Session,
    original: Session | None,
    inputs: Inputs,
    new_tokens: int,
    *,
    quantised: Session | None = None,
    seconds: float = 5.0,
    flops_kept: Mapping[str, float | None] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, PartLatency]:
    """Times of every part.

    Args:
        compressed: Engines of the compressed network.
        original: Engines of the original one; None to measure the compressed alone.
        inputs: One request of the workload.
        new_tokens: Of the workload; the first comes out of the prefill.
        quantised: Engines of the compressed network with quantised weights, if there are any.
        seconds: Measuring time of one part, all sides together.
        flops_kept: Part to the fraction of its FLOPs kept.
        progress: Told how many parts are measured, and of how many.

    Returns:
        Part to times.
    """
    every = {ORIGINAL: original, COMPRESSED: compressed, QUANTISED: quantised}
    sessions = {side: session for side, session in every.items() if session is not None}
    samples = {side: part_samples(session, inputs, new_tokens) for side, session in sessions.items()}
    measured: dict[str, PartLatency] = {}
    for part in samples[COMPRESSED]:
        progress(len(measured), len(samples[COMPRESSED]))
        times = {side: timing(ms) for side, ms in interleave({s: samples[s][part] for s in samples}, seconds=seconds).items()}
        before = times.get(ORIGINAL)
        measured[part] = PartLatency(
            original=before,
            compressed=times[COMPRESSED],
            speedup=_speedup(before, times[COMPRESSED]),
            quantised=times.get(QUANTISED),
            quantised_speedup=_speedup(before, times.get(QUANTISED)),
            flops_kept=(flops_kept or {}).get(part),
        )
    progress(len(measured), len(measured))
    return measured


def _speedup(before: Timing | None, after: Timing | None) -> float | None:
    return before.median_ms / after.median_ms if before and after and after.median_ms else None


def describe(record: PartLatency) -> str:
    """One line for a person."""
    line = f"{record.compressed.median_ms:.2f} ms (p90 {record.compressed.p90_ms:.2f}, n {record.compressed.n})"
    if record.original is not None and record.speedup is not None:
        line = f"{record.original.median_ms:.2f} to {line}, {record.speedup:.2f}x"
    if record.quantised is not None:
        line += f"; quantised {record.quantised.median_ms:.2f} ms"
    if record.quantised_speedup is not None:
        line += f", {record.quantised_speedup:.2f}x"
    return line


def kept_by_part(parts: Mapping[str, Mapping[str, int]]) -> dict[str, float | None]:
    """Fraction of the FLOPs kept by each part that is timed, from a manifest's `flops.parts`.

    The vision graph holds the projector, so their FLOPs go together.
    """
    members = {"vision": ("vision", "projector"), "prefill": ("prefill",), "decode": ("decode",), "end_to_end": tuple(parts)}
    return {part: _fraction([parts[m] for m in names if m in parts]) for part, names in members.items()}


def flop_parts(plan: Plan, workload: Workload) -> dict[str, dict[str, int]]:
    """FLOPs of each part, original and compressed, for a workload that is not the manifest's."""
    from infoprune_export.models.flops import count

    before, after = count(plan.anatomy, workload).parts(), count(plan.anatomy, workload, plan).parts()
    return {part: {ORIGINAL: before[part], COMPRESSED: after[part]} for part in before}


def _fraction(records: Sequence[Mapping[str, int]]) -> float | None:
    before = sum(r[ORIGINAL] for r in records)
    return sum(r[COMPRESSED] for r in records) / before if before else None


def timed(run: Callable[[], Any]) -> Sample:
    """A sample of all that `run` does."""

    def sample() -> float:
        start = time.perf_counter_ns()
        run()
        return (time.perf_counter_ns() - start) / 1e6

    return sample


def _exhaust(steps: Any) -> None:
    for _ in steps:
        pass
