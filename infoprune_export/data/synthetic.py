"""Questions without meaning about pictures of nothing, for models whose weights are random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from infoprune_export.data.vqa import Question


@dataclass(frozen=True)
class SyntheticImage:
    """Soft colours under noise, a picture of its own for each number; stands in for an `ImageRef`."""

    number: int
    side: int
    seed: int = 0

    def open(self) -> Image.Image:
        rng = np.random.default_rng([self.seed, self.number])
        colours = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((self.side, self.side), Image.Resampling.BICUBIC)
        noise = rng.normal(0, 24, (self.side, self.side, 1))
        return Image.fromarray(np.clip(np.asarray(colours) + noise, 0, 255).astype(np.uint8))


def synthetic_questions(words: Sequence[str], samples: int, *, length: int, answer: int, side: int, seed: int = 0) -> list[Question]:
    """Questions of random words, each about an image of its own.

    Args:
        words: One for each token that may be drawn.
        samples: How many questions.
        length: Words of a question.
        answer: Words of its answer.
        side: Height and width of an image, in pixels.
        seed: Of words and images; a larger sample begins with every smaller one.
    """
    questions = []
    for i in range(samples):
        drawn = np.random.default_rng([seed, i]).integers(len(words), size=length + answer)
        said = [words[k] for k in drawn]
        questions.append(Question(str(i), " ".join(said[:length]), (" ".join(said[length:]),), SyntheticImage(i, side, seed)))
    return questions
