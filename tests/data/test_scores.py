"""Scores worked out by hand from the rules of the three benchmarks."""

from __future__ import annotations

import pytest

from infoprune_export.data.scores import CONTRACTIONS, metric_name, normalise, score
from infoprune_export.errors import InputError


@pytest.mark.parametrize(
    ("raw", "processed"),
    [
        ("Yes", "yes"),
        ("  two \n", "2"),
        ("None", "0"),
        ("a red ball", "red ball"),
        ("The cat and the hat", "cat and hat"),
        ("dont know", "don't know"),
        ("it's", "it's"),
        ("couldntve", "couldntve"),  # only one apostrophe may be lacking
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),  # the official table has this one the wrong way round
        ("3.5", "3.5"),
        ("3.", "3"),
        ("U.S. Mail.", "us mail"),
        ("red/blue", "red blue"),
        ("red, blue", "red blue"),
        ("red,blue", "red blue"),
        ("1,000", "1000"),
        ("1,000 red/blue", "1000 redblue"),  # a comma in a number drops every mark
        ("t-shirt", "t shirt"),
        ("what ?", "what"),
        ("10:30", "10:30"),
        ("(left)", "left"),
        ("one\ttwo\nthree", "1 2 3"),
        ("eleven", "eleven"),
    ],
)
def test_vqav2_processing(raw: str, processed: str) -> None:
    assert normalise("vqav2", raw) == processed


@pytest.mark.parametrize(
    ("raw", "processed"),
    [
        ("McDonald's", "mcdonald 's"),  # TextVQA's evaluator takes the genitive apart
        ("STOP", "stop"),
        ("Red,Blue", "redblue"),  # and drops commas before all else
        ("1,000", "1000"),
        ("Really?", "really"),
        ("10-4", "10 4"),
        ("the end.", "end"),
        ("Nine", "9"),
    ],
)
def test_textvqa_processing(raw: str, processed: str) -> None:
    assert normalise("textvqa", raw) == processed


@pytest.mark.parametrize(("same", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
@pytest.mark.parametrize("format", ["vqav2", "textvqa"])
def test_leave_one_out(format, same: int, expected: float) -> None:
    # Of n people who agree, leaving one of them out leaves n - 1: (n min(1, (n-1)/3) + (10-n) min(1, n/3)) / 10.
    answers = ["red"] * same + [f"colour{i}" for i in range(10 - same)]
    assert score(format, "red", answers) == pytest.approx(expected)


def test_references_are_processed_too() -> None:
    assert score("textvqa", "9", ["Nine"] * 10) == 1
    assert score("vqav2", "The cat.", ["cat"] * 10) == 1


def test_gqa_is_exact_match() -> None:
    assert score("gqa", "Red.", ["red"]) == 1
    assert score("gqa", "dark red", ["red"]) == 0
    assert score("gqa", "the left", ["left"]) == 0


def test_no_answers_no_score() -> None:
    with pytest.raises(InputError, match="needs reference answers"):
        score("vqav2", "red", [])


def test_metric_names() -> None:
    assert [metric_name(f) for f in ("vqav2", "textvqa", "gqa")] == ["VQA accuracy", "VQA accuracy", "accuracy"]


def test_contractions_are_those_of_the_official_table() -> None:
    # It has 114 entries that change a lower-case word; a few that are easy to get wrong:
    assert len(CONTRACTIONS) == 114
    assert CONTRACTIONS["twas"] == "'twas" and CONTRACTIONS["'ows'at"] == "'ow's'at" and CONTRACTIONS["y'alld've"] == "y'all'd've"
    assert not {"shes", "lets", "wed", "ill", "im", "cmon"} & CONTRACTIONS.keys()
