"""The official scores of VQAv2, TextVQA and GQA, as their evaluators compute them.

VQAv2 and TextVQA compare an answer with ten people's. Both sides first pass the processing that
visualqa.org describes (punctuation, number words, articles, apostrophes of contractions); the answer
then earns min(1, n/3) of n people who said the same, averaged over the ten ways of leaving one person
out. The released VQAv2 annotations are already processed, so processing them again changes nothing;
TextVQA's are raw. GQA has one answer and counts exact matches.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from infoprune_export.errors import InputError

Format = Literal["vqav2", "textvqa", "gqa"]

ARTICLES = frozenset(("a", "an", "the"))
NUMBERS = dict(none="0", zero="0", one="1", two="2", three="3", four="4", five="5", six="6", seven="7", eight="8", nine="9", ten="10")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The evaluators' own pattern, (?!<=\d)(\.)(?!\d), misspells its look-behind: every full stop goes that no digit follows.
_FULL_STOP = re.compile(r"\.(?!\d)")

_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
    oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _lacking_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


# "somebodyd" stands in the evaluators' table the wrong way round; scores that are to compare with others keep it so.
CONTRACTIONS = {misspelt: word for word in _CONTRACTED.split() for misspelt in _lacking_one_apostrophe(word)} | {"somebody'd": "somebodyd"}


def normalise(format: Format, answer: str) -> str:
    """An answer as its benchmark's evaluator compares it.

    Args:
        format: Which benchmark.
        answer: A prediction or a reference answer.
    """
    if format == "gqa":
        return answer.strip().rstrip(".").lower()
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    if format == "textvqa":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _digits_and_articles(_punctuation(text))


def _punctuation(text: str) -> str:
    """Drops a mark that touches a space, turns any other into a space; a comma inside a number drops all marks."""
    drop_all = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if drop_all or f"{mark} " in text or f" {mark}" in text else " ")
    return _FULL_STOP.sub("", out)


def _digits_and_articles(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def score(format: Format, prediction: str, answers: Sequence[str]) -> float:
    """The official score of one prediction, 0 to 1.

    Args:
        format: Which benchmark.
        prediction: The model's answer.
        answers: The reference answers: ten for VQAv2 and TextVQA, one for GQA.

    Raises:
        InputError: no reference answers, as in the test splits.
    """
    if not answers:
        raise InputError(
            f"{metric_name(format)} needs reference answers, and these questions have none",
            mend="score a split that has them (val, testdev), or send the answers to the benchmark's server",
        )
    said = normalise(format, prediction)
    references = [normalise(format, answer) for answer in answers]
    if format == "gqa":
        return float(said == references[0])
    same = references.count(said)
    others = (same - (reference == said) for reference in references)
    return sum(min(1.0, n / 3) for n in others) / len(references)


def metric_name(format: Format) -> str:
    """What `score` averages to, in the words of the benchmark."""
    return {"vqav2": "VQA accuracy", "textvqa": "VQA accuracy", "gqa": "accuracy"}[format]
