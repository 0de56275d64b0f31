"""What every renderer returns, and the per-patch label layout they share.

The vision tower is first taught with one label vector per 8x8 patch. Each
column of that vector is one small classification problem ("which letter covers
this patch", "what colour is it"), listed in `HEADS` with its class count.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

IMAGE_SIZE = 64
PATCH = 8
GRID = IMAGE_SIZE // PATCH
IGNORE = -100

COLORS = {
    "red": (214, 36, 36),
    "green": (40, 160, 50),
    "blue": (40, 70, 220),
    "yellow": (235, 210, 30),
    "purple": (150, 50, 180),
    "orange": (245, 140, 20),
    "black": (20, 20, 20),
    "gray": (130, 130, 130),
    "teal": (0, 128, 128),
    "brown": (139, 69, 19),
}
COLOR_ID = {name: index + 1 for index, name in enumerate(COLORS)}
SHAPE_ID = {"circle": 1, "square": 2, "triangle": 3, "cross": 4, "rectangle": 5}
DIRECTIONS = ("left of", "right of", "above", "below")

# Class 0 of `letter` and `shape` means "nothing here"; the other columns are
# only supervised on patches that show something.
HEADS: dict[str, int] = {
    "letter": 27,
    "from_start": 6,
    "from_end": 6,
    "color": len(COLORS) + 1,
    "shape": len(SHAPE_ID) + 1,
    "size": 2,
}
for _direction in DIRECTIONS:
    HEADS[f"count {_direction}"] = 4
    HEADS[f"color {_direction}"] = len(COLORS) + 1
    HEADS[f"shape {_direction}"] = len(SHAPE_ID) + 1
HEAD_INDEX = {name: index for index, name in enumerate(HEADS)}


@dataclass
class Question:
    """One question about an image.

    Attributes:
        text: The question, lower case.
        answer: The single reference answer.
        kind: The question's type, used for reporting and for baselines.
        weight: Loss weight in training.
    """

    text: str
    answer: str
    kind: str
    weight: float = 1.0


@dataclass
class Sample:
    """An image with its questions and its per-patch labels (64 x heads)."""

    image: Image.Image
    questions: list[Question]
    patches: np.ndarray
    info: dict = field(default_factory=dict)


def empty_labels() -> np.ndarray:
    """Returns per-patch labels in which nothing is supervised."""
    return np.full((GRID * GRID, len(HEADS)), IGNORE, dtype=np.int64)


def patch_overlap(box: tuple[float, float, float, float]) -> np.ndarray:
    """Returns the area of `box` inside each patch, as a flat array of 64."""
    edges = np.arange(GRID) * PATCH
    width = np.clip(np.minimum(edges + PATCH, box[2]) - np.maximum(edges, box[0]), 0, None)
    height = np.clip(np.minimum(edges + PATCH, box[3]) - np.maximum(edges, box[1]), 0, None)
    return np.outer(height, width).reshape(-1)


def stream(*parts: object) -> random.Random:
    """Returns a random stream that depends only on `parts`."""
    return random.Random("/".join(str(part) for part in parts))


def jitter(rng: random.Random, rgb: tuple[int, int, int], amount: int) -> tuple[int, int, int]:
    """Returns `rgb` with each channel moved by at most `amount`."""
    return tuple(max(0, min(255, channel + rng.randint(-amount, amount))) for channel in rgb)


def pale(rng: random.Random) -> tuple[int, int, int]:
    """Returns a light background colour."""
    return tuple(rng.randint(215, 255) for _ in range(3))
