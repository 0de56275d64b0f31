"""Timing engines in turn, opened again and again: where an engine's weights come to lie depends on what is there already.

Of the same graphs one process gave a speed-up of 2.5, the next of 3.0, on one quiet machine; the very same product took 5 to 15% longer
in whichever engine was opened first, or last. So samples are pooled over several openings, each side first in half of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from infoprune_export.validation.latency import WARMUP_ROUNDS, Sample, interleave

OPENINGS = 4


def sampled(
    names: Sequence[str], opened: Callable[[str], Sample], *, seconds: float, warmup_rounds: int = WARMUP_ROUNDS, openings: int = OPENINGS
) -> dict[str, list[float]]:
    """Samples of all sides in turn, from several openings.

    Args:
        names: The sides.
        opened: Opens a side; the engine lives as long as the sample does.
        seconds: For all openings together, opening left out.
        warmup_rounds: After each opening, not counted.
        openings: The sides are opened in their order and the other way round by turns.

    Returns:
        Name to milliseconds.
    """
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(openings):
        sides = {name: opened(name) for name in (names[::-1] if i % 2 else names)}
        for name, ms in interleave(sides, seconds=seconds / openings, warmup_rounds=warmup_rounds).items():
            samples[name] += ms
        del sides  # before the next are opened
    return samples
