"""What a token costs by the tokens that are there and by the room behind them, on the dense decoder of `genai`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from shapes import Shape

from infoprune_export.validation.latency import interleave, timing
from speed.caches import Decoding, dense_engine
from speed.genai import DENSE

USED, SMALL, LARGE = 100, 256, 4096
LENGTHS = (100, 500, 1000, 1500, 2000, 2500, 3000, 3500, 4000)
CHUNK = 500
"""Tokens of the past that are read at a time."""


def measure(work: Path, threads: int, seconds: float, shape: Shape = DENSE, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Any]:
    """Times of one token.

    Args:
        work: For graphs and engines.
        threads: Of ONNX Runtime.
        seconds: For the capacities, and twice that for the lengths.
        shape: Of the decoder.
        lengths: Tokens in the cache, ascending, below `LARGE`.

    Returns:
        `capacity`, tokens of room to times at 100 tokens; `capacity_slope`, the ratio of their medians; `length`, tokens to times, at
        the large capacity; `length_fit`, R^2 of their medians by a line, and `line`: milliseconds of a token without a past, and
        microseconds more for each token of it.
    """
    _, engine = dense_engine(replace(shape, prompt=USED), work, threads)
    sides = {}
    for capacity in (SMALL, LARGE):
        request = Decoding(engine, shape.hidden, capacity)
        sides[str(capacity)] = request.decode(USED, request.read(USED)[1])
    rooms = {name: timing(ms) for name, ms in interleave(sides, seconds=seconds).items()}
    found = _by_length(engine, shape.hidden, lengths, 2 * seconds)
    medians = [t.median_ms for t in found.values()]
    slope, start = np.polyfit(lengths, medians, 1)
    return {
        "capacity": {name: t.model_dump() for name, t in rooms.items()},
        "capacity_slope": rooms[str(LARGE)].median_ms / rooms[str(SMALL)].median_ms,
        "length": {name: t.model_dump() for name, t in found.items()},
        "length_fit": float(np.corrcoef(lengths, medians)[0, 1] ** 2),
        "line": {"start_ms": float(start), "us_per_token": float(1e3 * slope)},
    }


def _by_length(engine: Any, hidden: int, lengths: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """Tokens in the cache to times of one more, in turn; the past is read once, and kept at each length."""
    request, past, step, sides = Decoding(engine, hidden, LARGE), 0, None, {}
    for length in lengths:
        while past < length:
            tokens = min(CHUNK, length - past)
            _, step = request.read(tokens, past, step)
            past += tokens
        kept = Decoding(engine, hidden, LARGE)
        kept.buffers = request.buffers.larger(length, LARGE)
        sides[str(length)] = kept.decode(length, step)
    return {name: timing(ms) for name, ms in interleave(sides, seconds=seconds).items()}
