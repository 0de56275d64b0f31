#!/usr/bin/env python3
"""Writes the embedded data sets of the `tiny-llava` recipe.

`OUT/tiny` holds, per task, a test split and a calibration split drawn from
train; `OUT/tiny_val` a validation split, for choosing. The same versions of
Pillow and of the fonts give the same bytes.

    python tools/make_tiny_data.py --out infoprune_export/data
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tiny_data import official
from tiny_data.splits import calibration, evaluation

# Most of them show words: reading is what compressed networks lose first, and learn again slowest.
TRAINING_IMAGES = {"vqa": 128, "text": 768, "gqa": 256}
VALIDATION_IMAGES = 100
TEST_IMAGES = {"vqa": 250, "text": 300, "gqa": 300}
# Easy-VQA has about ten questions per image, and the format spends 700 bytes on
# each; this many of them are embedded.
VQA_TEST_QUESTIONS = 4
VQA_VALIDATION_QUESTIONS = 3
VQA_TRAINING_QUESTIONS = 5


def write(out: Path) -> None:
    """Writes both directories below `out`."""
    tiny, tiny_val = out / "tiny", out / "tiny_val"

    official.write_vqa(tiny / "vqa", "train2014", calibration("vqa", TRAINING_IMAGES["vqa"], VQA_TRAINING_QUESTIONS))
    official.write_vqa(tiny / "vqa", "val2014", evaluation("vqa", "test", TEST_IMAGES["vqa"], VQA_TEST_QUESTIONS))
    official.write_vqa(tiny_val / "vqa", "val2014", evaluation("vqa", "val", VALIDATION_IMAGES, VQA_VALIDATION_QUESTIONS))

    official.write_textvqa(
        tiny / "textvqa",
        {"train": calibration("text", TRAINING_IMAGES["text"]), "val": evaluation("text", "test", TEST_IMAGES["text"])},
    )
    official.write_textvqa(tiny_val / "textvqa", {"val": evaluation("text", "val", VALIDATION_IMAGES)})

    official.write_gqa(
        tiny / "gqa",
        {"train": calibration("gqa", TRAINING_IMAGES["gqa"]), "testdev": evaluation("gqa", "test", TEST_IMAGES["gqa"])},
    )
    official.write_gqa(tiny_val / "gqa", {"testdev": evaluation("gqa", "val", VALIDATION_IMAGES)})


def main() -> None:
    """Parses the command line and writes the sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("infoprune_export/data"))
    args = parser.parse_args()
    write(args.out)
    files = [p for name in ("tiny", "tiny_val") for p in sorted((args.out / name).rglob("*")) if p.is_file()]
    for path in files:
        print(f"{path.stat().st_size:>9,}  {path}")
    print(f"{sum(p.stat().st_size for p in files):>9,}  in all")


if __name__ == "__main__":
    main()
