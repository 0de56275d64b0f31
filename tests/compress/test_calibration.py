"""Batches: equal lengths, answers as targets."""

import numpy as np

from infoprune_export.compress.calibration import Sample, make_batches


def _sample(prompt, answer, image=True):
    pixels = np.zeros((1, 3, 4, 4), np.float32) if image else None
    return Sample(np.arange(10, 10 + prompt), np.arange(50, 50 + answer), pixels)


def test_targets_are_the_answer_seen_from_one_position_before():
    (batch,) = make_batches([_sample(3, 2)])
    assert batch.inputs["input_ids"].tolist() == [[10, 11, 12, 50, 51]]
    assert batch.targets.tolist() == [[-100, -100, 50, 51, -100]]


def test_without_an_answer_every_text_token_is_a_target():
    (batch,) = make_batches([_sample(3, 0)])
    assert batch.targets.tolist() == [[11, 12, -100]]


def test_lengths_and_images_are_never_mixed_and_nothing_is_lost():
    samples = [_sample(3, 1), _sample(2, 2), _sample(5, 1), _sample(3, 1, image=False)] * 3
    batches = make_batches(samples, size=4)
    assert sum(b.samples for b in batches) == 12
    assert sorted(b.samples for b in batches) == [2, 3, 3, 4]
    assert sum("pixel_values" not in b.inputs for b in batches) == 1
