"""Batches: equal lengths, answers as targets."""

import numpy as np
import pytest

from infoprune_export.compress.calibration import Sample, fitting, make_batches
from infoprune_export.errors import InputError


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


def test_lengths_and_images_are_never_mixed_and_nothing_is_lost(monkeypatch):
    monkeypatch.setattr("infoprune_export.compress.calibration.MOST_SAMPLES", 4)
    samples = [_sample(3, 1), _sample(2, 2), _sample(5, 1), _sample(3, 1, image=False)] * 3
    batches = make_batches(samples)
    assert sum(b.samples for b in batches) == 12
    assert sorted(b.samples for b in batches) == [2, 3, 3, 4]
    assert sum("pixel_values" not in b.inputs for b in batches) == 1


@pytest.mark.parametrize(("length", "size"), [(80, 16), (640, 3), (5000, 1)])
def test_longer_questions_come_in_smaller_batches(length, size):
    assert max(b.samples for b in make_batches([_sample(length - 1, 1)] * 20)) == size


def test_questions_longer_than_the_context_are_left_out_and_counted():
    told = []
    samples = [_sample(3, 1), _sample(8, 1), _sample(4, 1), _sample(4, 2)]
    assert fitting(samples, 5, told.append) == [samples[0], samples[2]]
    assert told == ["2 of 4 calibration questions are longer than the model's context of 5 tokens and are left out"]
    assert fitting(samples, None, told.append) == samples


def test_a_context_that_no_question_fits_is_refused():
    with pytest.raises(InputError, match="longer than the model's context of 2 tokens"):
        fitting([_sample(3, 1)], 2, print)
