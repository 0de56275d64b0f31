"""Scenes of two to four coloured shapes, drawn so that relations are clear."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from tiny_data.sample import (
    COLOR_ID,
    COLORS,
    DIRECTIONS,
    HEAD_INDEX,
    IMAGE_SIZE,
    SHAPE_ID,
    Sample,
    empty_labels,
    jitter,
    pale,
    patch_overlap,
)

SHAPES = ("circle", "square", "triangle", "cross")
SCENE_COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "gray")
SIZES = ("small", "large")
_RADIUS = {"small": (5, 6), "large": (9, 10)}
# Centres differ by at least this much on both axes, so that "left of" and
# "above" hold or fail without doubt for every pair.
_GAP = 8
_EDGE = 11


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; `(color, shape)` is unique within the scene."""

    color: str
    shape: str
    size: str
    x: int
    y: int
    radius: int

    @property
    def name(self) -> str:
        """The phrase that singles it out."""
        return f"{self.color} {self.shape}"


def related(things: list[Thing], anchor: Thing, direction: str) -> list[Thing]:
    """Returns the things that are in `direction` of `anchor`."""
    test = {
        "left of": lambda t: t.x < anchor.x,
        "right of": lambda t: t.x > anchor.x,
        "above": lambda t: t.y < anchor.y,
        "below": lambda t: t.y > anchor.y,
    }[direction]
    return [t for t in things if t is not anchor and test(t)]


def _spread(rng: random.Random, count: int) -> list[int]:
    room = IMAGE_SIZE - 2 * _EDGE - (count - 1) * _GAP
    places = sorted(rng.randint(0, room) for _ in range(count))
    places = [_EDGE + place + index * _GAP for index, place in enumerate(places)]
    rng.shuffle(places)
    return places


def _apart(a: Thing, b: Thing) -> bool:
    reach = a.radius + b.radius + 2
    return abs(a.x - b.x) >= reach or abs(a.y - b.y) >= reach


def layout(rng: random.Random) -> list[Thing]:
    """Returns two to four shapes that do not touch."""
    count = rng.choice((2, 3, 3, 4, 4))
    while True:
        # Few colours and shapes per scene, so that a colour or a shape alone
        # often does not single a thing out.
        colors = rng.sample(SCENE_COLORS, 3)
        shapes = rng.sample(SHAPES, 3)
        pairs = rng.sample([(c, s) for c in colors for s in shapes], count)
        things = []
        for (color, shape), x, y in zip(pairs, _spread(rng, count), _spread(rng, count), strict=True):
            size = rng.choice(SIZES)
            things.append(Thing(color, shape, size, x, y, rng.randint(*_RADIUS[size])))
        if all(_apart(a, b) for i, a in enumerate(things) for b in things[:i]):
            return things


def _draw(pen: ImageDraw.ImageDraw, thing: Thing, fill: tuple[int, int, int]) -> None:
    x, y, r = thing.x, thing.y, thing.radius
    if thing.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.shape == "triangle":
        pen.polygon(((x, y - r), (x + r, y + r), (x - r, y + r)), fill=fill)
    else:
        arm = max(1, r // 3)
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)


def _patch_labels(things: list[Thing]):
    labels = empty_labels()
    labels[:, HEAD_INDEX["letter"]] = 0
    labels[:, HEAD_INDEX["shape"]] = 0
    best = [0.0] * len(labels)
    for thing in things:
        row = {
            "shape": SHAPE_ID[thing.shape],
            "color": COLOR_ID[thing.color],
            "size": SIZES.index(thing.size),
        }
        for direction in DIRECTIONS:
            others = related(things, thing, direction)
            row[f"count {direction}"] = len(others)
            if len(others) == 1:
                row[f"color {direction}"] = COLOR_ID[others[0].color]
                row[f"shape {direction}"] = SHAPE_ID[others[0].shape]
        r = thing.radius
        area = patch_overlap((thing.x - r, thing.y - r, thing.x + r + 1, thing.y + r + 1))
        for patch in area.nonzero()[0]:
            if area[patch] >= 16 and area[patch] > best[patch]:
                best[patch] = area[patch]
                for head, value in row.items():
                    labels[patch, HEAD_INDEX[head]] = value
    return labels


def render(rng: random.Random) -> Sample:
    """Returns a scene without questions; `info["things"]` holds its contents."""
    things = layout(rng)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), pale(rng))
    pen = ImageDraw.Draw(image)
    for thing in things:
        _draw(pen, thing, jitter(rng, COLORS[thing.color], 12))
    return Sample(image, [], _patch_labels(things), {"things": things})
