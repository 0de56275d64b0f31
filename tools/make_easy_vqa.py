#!/usr/bin/env python3
"""Writes easy-VQA in the official VQAv2 files, in the splits that `smol-llava` was trained with.

`OUT/train` holds the official train images less 200 that were held out of the training, `OUT/val` those 200, `OUT/test` the
official test images; each with all its questions. Choices are made on val, reports on test. The images and questions are
those of the `easy-vqa` package (in the `train` extra).

    python tools/make_easy_vqa.py                    # into build/easy-vqa
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from tiny_data import easy_shapes, official
from tiny_data.sample import Sample

from infoprune_export.errors import InfoPruneError

SUBTYPES = {"train": "train2014", "val": "val2014", "test": "test2015"}
# Those of smol-llava's training; tiny-llava held out other images.
HELD_OUT, SEED = 200, 1234


def image_ids(split: str) -> list[int]:
    """Returns the official image ids of `train`, `val` (out of the official train images) or `test`, in ascending order."""
    if split == "test":
        return list(easy_shapes.image_ids("test"))
    ids = sorted([*easy_shapes.image_ids("train"), *easy_shapes.image_ids("val")])
    shuffled = ids.copy()
    random.Random(SEED).shuffle(shuffled)
    held_out = set(shuffled[:HELD_OUT])
    return [i for i in ids if (i in held_out) == (split == "val")]


def samples(split: str) -> Iterator[Sample]:
    """Yields the images of a split with all their questions."""
    for image_id in image_ids(split):
        yield easy_shapes.sample("test" if split == "test" else "train", image_id)


def main() -> int:
    """Parses the command line and writes the three splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/easy-vqa"), help="directory to write (default: %(default)s)")
    args = parser.parse_args()
    try:
        for split, subtype in SUBTYPES.items():
            official.write_vqa(args.out / split, subtype, samples(split))
            print(f"{args.out / split}: {len(image_ids(split)):,} images")
    except InfoPruneError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
