"""Words rendered on plain backgrounds, with questions about their letters."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tiny_data import words
from tiny_data.sample import (
    COLORS,
    HEAD_INDEX,
    IMAGE_SIZE,
    PATCH,
    Question,
    Sample,
    empty_labels,
    jitter,
    pale,
    patch_overlap,
)

# Free fonts that come with matplotlib: DejaVu (Bitstream Vera licence) and STIX
# (OFL).
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "STIXGeneralBol",
)
SIZES = (16, 20, 24)
# For the widest words in the widest fonts.
_SMALL_SIZES = (13, 12, 11, 10, 9)
_PLACES = (("first", 0), ("second", 1), ("third", 2), ("last", -1))
# Inks that stand out from every pale background.
_INKS = tuple(name for name in COLORS if name not in ("yellow", "gray"))
_WORD_FORMS = ("what is the word?", "what word is shown?", "what does the text say?")
_MARGIN = 2


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _choose_font(rng: random.Random, word: str) -> tuple[ImageFont.FreeTypeFont, str, int]:
    name = rng.choice(FONTS)
    limit = IMAGE_SIZE - 2 * _MARGIN

    def fits(size: int) -> bool:
        left, _, right, _ = _font(name, size).getbbox(word)
        return right - left <= limit

    fitting = [size for size in SIZES if fits(size)]
    size = rng.choice(fitting) if fitting else next(filter(fits, _SMALL_SIZES), _SMALL_SIZES[-1])
    return _font(name, size), name, size


def _vertical_place(rng: random.Random, top: int, bottom: int) -> int:
    """Returns where to draw so that the capitals sit on one of five lines.

    The lines are 8 pixels apart. A tower this small learns to read sooner when
    letters do not come at every height.
    """
    line = PATCH * rng.randint(2, 6)
    return line - (top + bottom) // 2


def questions_for(rng: random.Random, word: str) -> list[Question]:
    """Returns the word question and the four letter questions, in that order."""
    asked = [Question(rng.choice(_WORD_FORMS), word, "word")]
    for name, index in _PLACES:
        asked.append(Question(f"what is the {name} letter?", word[index], f"{name} letter"))
    return asked


def render(rng: random.Random, word: str, limit: int | None = None) -> Sample:
    """Renders `word` and asks about it.

    Args:
        rng: Stream that decides font, size, colours and place.
        word: Upper-case letters.
        limit: Keep the word question and `limit - 1` letter questions; all if None.

    Returns:
        The sample, with per-patch letter labels.
    """
    font, font_name, size = _choose_font(rng, word)
    ink_name = rng.choice(_INKS)
    ink = jitter(rng, COLORS[ink_name], 20)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), pale(rng))
    left, top, right, bottom = font.getbbox(word)
    x = rng.randint(_MARGIN, max(_MARGIN, IMAGE_SIZE - _MARGIN - (right - left))) - left
    y = _vertical_place(rng, top, bottom)
    ImageDraw.Draw(image).text((x, y), word, font=font, fill=ink)

    labels = empty_labels()
    labels[:, HEAD_INDEX["letter"]] = 0
    labels[:, HEAD_INDEX["shape"]] = 0
    best = [0.0] * len(labels)
    for index, letter in enumerate(word):
        start, end = font.getlength(word[:index]), font.getlength(word[: index + 1])
        area = patch_overlap((x + start, y + top, x + end, y + bottom))
        for patch in area.nonzero()[0]:
            if area[patch] >= 12 and area[patch] > best[patch]:
                best[patch] = area[patch]
                labels[patch, HEAD_INDEX["letter"]] = ord(letter) - ord("A") + 1
                labels[patch, HEAD_INDEX["from_start"]] = index
                labels[patch, HEAD_INDEX["from_end"]] = len(word) - 1 - index

    asked = questions_for(rng, word)
    if limit is not None:
        asked = asked[:1] + rng.sample(asked[1:], limit - 1)
    info = {"word": word, "font": font_name, "size": size, "ink": ink_name}
    return Sample(image, asked, labels, info)


def training_sample(rng: random.Random) -> Sample:
    """Returns a fresh training image.

    A word is several tokens: it counts as two questions, not as five.
    """
    sample = render(rng, words.pick_for_training(rng))
    sample.questions[0].weight = 2 / len(sample.questions[0].answer)
    return sample


def held_out_sample(rng: random.Random, index: int, limit: int = 3) -> Sample:
    """Returns an evaluation image: every other word was never seen in training."""
    unseen = index % 2 == 1
    word = words.pick_held_out(rng) if unseen else words.pick_seen(rng)
    sample = render(rng, word, limit)
    sample.info["unseen_word"] = unseen
    return sample
