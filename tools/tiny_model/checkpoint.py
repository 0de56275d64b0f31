"""Checkpoints that survive a kill at any moment, and the finished directory."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor


def save(path: Path, state: dict) -> None:
    """Writes `state` so that `path` always holds a whole checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path: Path) -> dict | None:
    """Returns the checkpoint at `path`, or None if there is none."""
    if not path.exists():
        return None
    return torch.load(path, map_location="cpu", weights_only=True)


def export(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Writes the standard Hugging Face directory, weights in float16.

    `config.json` asks for float32, so that a plain `from_pretrained` computes in
    float32 with the rounded weights. Files are put in place one by one by
    renaming; the training model itself is left in float32.
    """
    out.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".export-", dir=out.parent))
    try:
        half = LlavaForConditionalGeneration(model.config)
        half.load_state_dict(model.state_dict())
        half.tie_weights()
        half.generation_config = model.generation_config
        half.half().save_pretrained(staging)
        processor.save_pretrained(staging)
        config_path = staging / "config.json"
        config = json.loads(config_path.read_text())
        for part in (config, config["text_config"], config["vision_config"]):
            part["dtype"] = "float32"
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        # Names that readers other than this transformers release know, too.
        tokenizer_path = staging / "tokenizer_config.json"
        tokenizer = json.loads(tokenizer_path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        tokenizer_path.write_text(json.dumps(tokenizer, indent=2, sort_keys=True) + "\n")
        images = json.loads((staging / "processor_config.json").read_text())["image_processor"]
        (staging / "preprocessor_config.json").write_text(json.dumps(images, indent=2, sort_keys=True) + "\n")
        for file in sorted(staging.iterdir()):
            file.chmod(0o644)
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
