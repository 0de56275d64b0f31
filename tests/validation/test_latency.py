from __future__ import annotations

import itertools

import numpy as np
import pytest

from infoprune_export.errors import InputError
from infoprune_export.models.flops import count
from infoprune_export.recipe import Workload
from infoprune_export.validation.latency import flop_parts, interleave, kept_by_part, measure, random_inputs, timing

IMAGE_TOKEN = 31
WORKLOAD = Workload(image_tokens=4, text_tokens=6, new_tokens=5)


def test_order_statistics_in_closed_form():
    t = timing(range(101))
    assert (t.median_ms, t.p90_ms, t.p95_ms, t.p99_ms, t.mean_ms, t.min_ms, t.max_ms, t.n) == (50, 90, 95, 99, 50, 0, 100, 101)
    assert timing([1, 2]).median_ms == 1.5


def test_sides_run_in_turn_and_the_warm_up_is_not_counted():
    order = []
    sides = {side: lambda side=side: float(order.append(side) or len(order)) for side in ("original", "compressed")}
    samples = interleave(sides, seconds=0, warmup_rounds=2, min_rounds=3)
    there = ["original", "compressed"]
    assert order == [*there, *there, *there, *there[::-1], *there]
    assert samples == {"original": [5, 8, 9], "compressed": [6, 7, 10]}


def test_measuring_ends_with_the_time_or_the_most_rounds():
    ticks = itertools.count()
    timed = interleave({"a": lambda: 1.0}, seconds=10, warmup_rounds=0, clock=lambda: float(next(ticks)))
    # The clock is read once at the start and once a round from the fourth on: 3 uncounted reads, then up to second 10.
    assert len(timed["a"]) == 12
    assert len(interleave({"a": lambda: 1.0}, seconds=1e9, warmup_rounds=0, max_rounds=7)["a"]) == 7


def test_every_part_of_both_sides(session, make_session, anatomy):
    inputs = random_inputs(anatomy, WORKLOAD, IMAGE_TOKEN)
    parts = measure(session, make_session(1), inputs, WORKLOAD.new_tokens, seconds=0, flops_kept={"decode": 0.5})
    assert list(parts) == ["vision", "prefill", "decode", "end_to_end"]
    for part in parts.values():
        assert part.original.n == part.compressed.n == 3
        assert part.speedup == part.original.median_ms / part.compressed.median_ms
    assert parts["decode"].flops_kept == 0.5 and parts["vision"].flops_kept is None


def test_without_an_original_there_is_no_speedup(session, anatomy):
    parts = measure(session, None, random_inputs(anatomy, WORKLOAD, IMAGE_TOKEN), WORKLOAD.new_tokens, seconds=0)
    assert all(p.original is None and p.speedup is None and p.compressed.n == 3 for p in parts.values())


def test_a_text_only_single_token_workload_has_neither_vision_nor_decode(session, anatomy):
    workload = Workload(images=0, text_tokens=4, new_tokens=1)
    inputs = random_inputs(anatomy, workload, IMAGE_TOKEN)
    assert inputs.pixel_values is None
    assert list(measure(session, None, inputs, 1, seconds=0)) == ["prefill", "end_to_end"]


def test_decode_starts_again_after_the_workloads_last_step(session, anatomy):
    measure(session, None, random_inputs(anatomy, WORKLOAD, IMAGE_TOKEN), 3, seconds=0)
    calls = "".join(c[0] for c in session.calls)
    assert "ppddddd" in calls, "steps only, from the cache of one prompt: the warm-up's two and the three counted"


def test_inputs_are_valid_and_repeatable(anatomy):
    workload = Workload(batch=2, images=2, image_tokens=4, text_tokens=40, new_tokens=2)
    inputs, again = (random_inputs(anatomy, workload, IMAGE_TOKEN) for _ in range(2))
    assert inputs.pixel_values.shape == (4, 3, 8, 8) and len(inputs.input_ids) == 2
    for ids, same in zip(inputs.input_ids, again.input_ids, strict=True):
        assert len(ids) == workload.prompt_tokens and (ids == IMAGE_TOKEN).sum() == 8 and ids.min() >= 0 and ids.max() < 32
        assert np.array_equal(ids, same)


def test_image_tokens_that_are_not_the_models(anatomy):
    with pytest.raises(InputError, match=r"workload.image_tokens: 576 image tokens, but this model makes 4"):
        random_inputs(anatomy, Workload(), IMAGE_TOKEN)


def test_flops_kept_of_the_very_part(anatomy, plan):
    before, after = count(anatomy, WORKLOAD), count(anatomy, WORKLOAD, plan)
    kept = kept_by_part(flop_parts(plan, WORKLOAD))
    assert kept["vision"] == (after.vision + after.projector) / (before.vision + before.projector)
    assert kept["prefill"] == after.prefill / before.prefill and kept["decode"] == after.decode / before.decode
    assert kept["end_to_end"] == after.total / before.total
    nothing = flop_parts(plan, Workload(images=0, text_tokens=4, new_tokens=1))
    assert kept_by_part(nothing)["decode"] is None and kept_by_part(nothing)["vision"] is None
