from __future__ import annotations

import numpy as np
import pytest

from infoprune_export.recipe import Workload
from infoprune_export.runtime.session import padding_id
from infoprune_export.validation import accuracy
from infoprune_export.validation.accuracy import Example, answer, paired_drop, record, wilson
from infoprune_export.validation.generation import Limits, continue_greedily, cut_at, limits_of

IMAGE_TOKEN, EOS = 31, 30


def examples(count: int, images: int) -> list[Example]:
    rng = np.random.default_rng(3)
    made = []
    for i in range(count):
        text = rng.integers(0, EOS, 2 + i % 7)
        made.append(Example(f"image {i * 5 % images}", np.concatenate([text[:1], [IMAGE_TOKEN] * 4, text[1:]]).astype(np.int64)))
    return made


def load(image: str) -> np.ndarray:
    return np.random.default_rng(int(image.split()[1])).standard_normal((1, 3, 3, 8)).astype(np.float32)


def test_batched_answers_are_the_unbatched_ones(session, monkeypatch):
    questions = examples(23, 6)
    alone = [answer(session, [q], load, (EOS,), max_new_tokens=7)[0] for q in questions]
    monkeypatch.setattr(accuracy, "IMAGES_AT_A_TIME", 4)
    together = answer(session, questions, load, (EOS,), max_new_tokens=7, limits=Limits(batch=5, images=3))
    assert [a.tolist() for a in together] == [a.tolist() for a in alone]
    assert len({tuple(a.tolist()) for a in alone}) > 10, "the fake answers differ, so an exchange would show"


def test_every_image_is_encoded_once(session):
    answer(session, examples(23, 6), load, (EOS,), limits=Limits(batch=4, images=4))
    assert session.images_encoded == 6


def test_progress_adds_up(session):
    done = []
    answer(session, examples(10, 3), load, (EOS,), limits=Limits(batch=4), progress=done.append)
    assert sum(done) == 10


def test_padding_is_no_image():
    assert padding_id(0) != 0 and padding_id(None) == padding_id(IMAGE_TOKEN) == 0


def test_limits_are_those_the_engine_was_built_for():
    assert limits_of("ort", Workload(batch=2)) == Limits()
    workload = Workload(batch=2, images=3, image_tokens=10, text_tokens=5, new_tokens=7)
    limits = limits_of("trt", workload)
    assert (limits.batch, limits.images) == (2, 6) and limits.tokens >= 3 * 10 + 5 + 7


def test_answers_end_before_the_end_of_sequence(session):
    assert cut_at(np.array([4, 5, EOS, 6]), (EOS,)).tolist() == [4, 5]
    assert cut_at(np.array([4, 5]), (EOS,)).tolist() == [4, 5]
    first = continue_greedily(session, [np.array([1, 2])], None, 4, ())[0]
    assert len(first) == 4
    stopped = continue_greedily(session, [np.array([1, 2])], None, 4, (int(first[1]),))
    assert stopped[0].tolist() == first[: list(first).index(first[1])].tolist()


@pytest.mark.parametrize(
    ("mean", "n", "low", "high"),
    [
        # Published values of Wilson's interval (95%): 0 of 10, 5 of 10, 81 of 263 (Newcombe 1998, table I).
        (0.0, 10, 0.0, 0.2775),
        (0.5, 10, 0.2366, 0.7634),
        (81 / 263, 263, 0.2553, 0.3662),
        (1.0, 10, 0.7225, 1.0),
    ],
)
def test_wilson_interval(mean, n, low, high):
    interval = wilson(mean, n)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_paired_drop_in_closed_form():
    mean, interval = paired_drop([1, 1, 1, 0], [1, 0, 1, 0])
    # Bonett and Price: p = (1 + 1) / 6 lost, q = (0 + 1) / 6 won; p - q +- z sqrt((p + q - (p - q)^2) / 6).
    half = 1.959964 * ((3 / 6 - 1 / 36) / 6) ** 0.5
    assert mean == 25
    assert (interval.low, interval.high) == (pytest.approx(100 * (1 / 6 - half)), pytest.approx(100 * (1 / 6 + half)))


def test_answering_alike_on_few_questions_proves_little():
    mean, interval = paired_drop([1.0] * 100, [1.0] * 100)
    assert mean == 0 and interval.low == -interval.high and 2 < interval.high < 4


def test_record_with_and_without_the_original():
    both = record([1, 1, 0, 1], [1, 0, 0, 1], metric="VQA accuracy", engine="ort", dtype="fp32")
    assert (both.original, both.compressed, both.n, both.drop_points) == (0.75, 0.5, 4, 25)
    alone = record(None, [1, 0], metric="VQA accuracy", engine="ort", dtype="fp32")
    assert (alone.original, alone.compressed, alone.drop_points, alone.original_interval) == (None, 0.5, None, None)
