"""GQA-like questions about scenes; most of them take two steps.

Answers are balanced by drawing the wanted answer first: yes and no are equally
likely, and counts are drawn evenly among those the scene allows.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tiny_data.sample import DIRECTIONS, Question, Sample
from tiny_data.scenes import SCENE_COLORS, SHAPES, Thing, related, render

Maker = Callable[[random.Random, list[Thing]], Question]


def _lone_neighbour(rng: random.Random, things: list[Thing]) -> tuple[Thing, str, Thing]:
    """Returns an anchor, a direction and the only thing there.

    There always is one: the second thing from the left has one thing to its left.
    """
    found = []
    for anchor in things:
        for direction in DIRECTIONS:
            there = related(things, anchor, direction)
            if len(there) == 1:
                found.append((anchor, direction, there[0]))
    return rng.choice(found)


def _relate_color(rng: random.Random, things: list[Thing]) -> Question:
    anchor, direction, target = _lone_neighbour(rng, things)
    return Question(f"what color is the shape {direction} the {anchor.name}?", target.color, "relate color")


def _relate_shape(rng: random.Random, things: list[Thing]) -> Question:
    anchor, direction, target = _lone_neighbour(rng, things)
    return Question(f"what shape is {direction} the {anchor.name}?", target.shape, "relate shape")


def _relate_size(rng: random.Random, things: list[Thing]) -> Question:
    anchor, direction, target = _lone_neighbour(rng, things)
    return Question(f"what size is the shape {direction} the {anchor.name}?", target.size, "relate size")


def _relate_verify(rng: random.Random, things: list[Thing]) -> Question:
    """Is the circle above the blue square red?"""
    anchor, direction, target = _lone_neighbour(rng, things)
    if rng.random() < 0.5:
        color, answer = target.color, "yes"
    else:
        # A wrong colour that the picture shows is a better trap than any other.
        shown = sorted({t.color for t in things} - {target.color})
        color = rng.choice(shown) if shown and rng.random() < 0.7 else rng.choice([c for c in SCENE_COLORS if c != target.color])
        answer = "no"
    what = rng.choice(("shape", target.shape))
    return Question(f"is the {what} {direction} the {anchor.name} {color}?", answer, "relate verify")


def _relate_count(rng: random.Random, things: list[Thing]) -> Question:
    by_count: dict[int, list[tuple[Thing, str]]] = {}
    for anchor in things:
        for direction in DIRECTIONS:
            by_count.setdefault(len(related(things, anchor, direction)), []).append((anchor, direction))
    count = rng.choice(sorted(by_count))
    anchor, direction = rng.choice(by_count[count])
    return Question(f"how many shapes are {direction} the {anchor.name}?", str(count), "relate count")


def _compare_place(rng: random.Random, things: list[Thing]) -> Question:
    first, second = rng.sample(things, 2)
    direction = rng.choice(DIRECTIONS)
    answer = "yes" if first in related(things, second, direction) else "no"
    return Question(f"is the {first.name} {direction} the {second.name}?", answer, "compare place")


def _count(rng: random.Random, things: list[Thing]) -> Question:
    if rng.random() < 0.5:
        counts = {f"{c} shapes": sum(t.color == c for t in things) for c in SCENE_COLORS}
    else:
        plural = {s: "crosses" if s == "cross" else s + "s" for s in SHAPES}
        counts = {plural[s]: sum(t.shape == s for t in things) for s in SHAPES}
    wanted = rng.choice(sorted(set(counts.values())))
    what = rng.choice([name for name, count in counts.items() if count == wanted])
    return Question(f"how many {what} are there?", str(wanted), "count")


def _article(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def _exist(rng: random.Random, things: list[Thing]) -> Question:
    names = {t.name for t in things}
    if rng.random() < 0.5:
        return Question(f"is there {_article(rng.choice(things).name)}?", "yes", "exist")
    # Both words fit the picture, but not the same thing, where that is possible.
    mixed = sorted({f"{a.color} {b.shape}" for a in things for b in things} - names)
    if not mixed or rng.random() < 0.3:
        mixed = [f"{c} {s}" for c in SCENE_COLORS for s in SHAPES if f"{c} {s}" not in names]
    return Question(f"is there {_article(rng.choice(mixed))}?", "no", "exist")


def _size(rng: random.Random, things: list[Thing]) -> Question:
    thing = rng.choice(things)
    return Question(f"is the {thing.name} small or large?", thing.size, "choose size")


_MAKERS: tuple[Maker, ...] = (
    _relate_color,
    _relate_color,
    _relate_shape,
    _relate_size,
    _relate_verify,
    _relate_count,
    _compare_place,
    _count,
    _exist,
    _size,
)


def _exist_attribute(rng: random.Random, things: list[Thing]) -> Question:
    """Is there a red shape? Is there a circle?"""
    shown, every, form = rng.choice(
        (
            ({t.color for t in things}, SCENE_COLORS, "{} shape"),
            ({t.shape for t in things}, SHAPES, "{}"),
        )
    )
    if rng.random() < 0.5:
        return Question(f"is there {_article(form.format(rng.choice(sorted(shown))))}?", "yes", "exist attribute")
    absent = rng.choice([value for value in every if value not in shown])
    return Question(f"is there {_article(form.format(absent))}?", "no", "exist attribute")


def _verify_attribute(rng: random.Random, things: list[Thing]) -> Question:
    """Is the circle red? Asked of a kind of shape that the scene shows once, if there is one."""
    lone = [t for t in things if sum(o.shape == t.shape for o in things) == 1]
    if not lone:
        return _exist_attribute(rng, things)
    thing = rng.choice(lone)
    if rng.random() < 0.5:
        return Question(f"is the {thing.shape} {thing.color}?", "yes", "verify attribute")
    others = sorted({t.color for t in things} - {thing.color}) or [c for c in SCENE_COLORS if c != thing.color]
    return Question(f"is the {thing.shape} {rng.choice(others)}?", "no", "verify attribute")


def _alone(things: list[Thing], attribute: str) -> list[Thing]:
    """Returns the things whose `attribute` no other thing shares."""
    values = [getattr(t, attribute) for t in things]
    return [t for t in things if values.count(getattr(t, attribute)) == 1]


def _look_up(rng: random.Random, things: list[Thing]) -> Question:
    """What color is the circle? What is the red shape? What size is the red circle?"""
    kind = rng.choice(("color", "shape", "size"))
    if kind == "color" and (found := _alone(things, "shape")):
        thing = rng.choice(found)
        return Question(f"what color is the {thing.shape}?", thing.color, "look up")
    if kind == "shape" and (found := _alone(things, "color")):
        thing = rng.choice(found)
        return Question(f"what is the {thing.color} shape?", thing.shape, "look up")
    thing = rng.choice(things)
    return Question(f"what size is the {thing.name}?", thing.size, "look up")


#: One-step yes/no questions that only training asks: a network learns to
#: compare on these first.
_WARM_UP: tuple[Maker, ...] = (_exist_attribute, _exist_attribute, _verify_attribute, _exist)


def warm_up(rng: random.Random, things: list[Thing], count: int) -> list[Question]:
    """Returns different one-step questions, up to `count` yes/no ones and as many others.

    Without the look-ups nothing teaches a network to find the thing that a
    phrase names: what lies alone in some direction is the outermost thing
    there, whatever it is compared with.
    """
    asked = [rng.choice(_WARM_UP)(rng, things) for _ in range(count)]
    asked += [_look_up(rng, things) for _ in range(count)]
    return list({question.text: question for question in asked}.values())


def ask(rng: random.Random, things: list[Thing], count: int) -> list[Question]:
    """Returns `count` different questions about a scene."""
    asked: dict[str, Question] = {}
    makers = list(_MAKERS)
    while len(asked) < count:
        rng.shuffle(makers)
        for maker in makers[: count - len(asked)]:
            question = maker(rng, things)
            asked.setdefault(question.text, question)
    return list(asked.values())


def sample(rng: random.Random, count: int = 8) -> Sample:
    """Returns a fresh scene with `count` questions."""
    scene = render(rng)
    scene.questions = ask(rng, scene.info["things"], count)
    return scene


def training_sample(rng: random.Random) -> Sample:
    """Returns a fresh scene with questions of the task and one-step ones."""
    scene = sample(rng, 5)
    scene.questions += warm_up(rng, scene.info["things"], 3)
    return scene
