import numpy as np

from infoprune_export.data.synthetic import SyntheticImage, synthetic_questions

WORDS = [f"w{i}" for i in range(50)]


def test_a_larger_sample_begins_with_every_smaller_one():
    few, many = (synthetic_questions(WORDS, n, length=12, answer=3, side=20, seed=4) for n in (2, 5))
    assert many[:2] == few
    assert synthetic_questions(WORDS, 2, length=12, answer=3, side=20, seed=5) != few


def test_questions_have_the_length_asked_for_and_say_different_things():
    questions = synthetic_questions(WORDS, 8, length=12, answer=3, side=20)
    assert {len(q.question.split()) for q in questions} == {12}
    assert {len(q.answers[0].split()) for q in questions} == {3}
    assert len({q.question for q in questions}) == len({q.image for q in questions}) == 8


def test_images_are_the_same_every_time_and_differ_from_one_another():
    first, again, other = (np.asarray(SyntheticImage(i, 32).open(), np.float64) for i in (0, 0, 1))
    assert first.shape == (32, 32, 3)
    assert (first == again).all()
    assert abs(first - other).mean() > 10
