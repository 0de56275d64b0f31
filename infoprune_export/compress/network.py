"""The smaller network on disk: safetensors in, safetensors out, its shapes from the plan beside them."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from infoprune_export.compress.surgery import shape_as_planned
from infoprune_export.errors import InputError
from infoprune_export.plans import Plan


def load_network(root: Path) -> nn.Module:
    """The compressed PyTorch model of a bundle (or of what `apply` wrote), with the very weights that were saved."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    plan = Plan.read(root / "plan.json")
    config = AutoConfig.from_pretrained(root, local_files_only=True)
    config.dtype = torch.float32
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    shape_as_planned(model, plan)
    state = load_file(root / "model" / "model.safetensors")
    result = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    absent = set(result.missing_keys) - set(model._tied_weights_keys or ())
    if absent or result.unexpected_keys:
        name = sorted([*absent, *result.unexpected_keys])[0]
        raise InputError(f"{name} does not fit the plan", where=root / "model" / "model.safetensors", mend="fetch or make the bundle again")
    model.infoprune_plan = plan
    return model.eval().requires_grad_(False)


def save_weights(model: nn.Module, path: Path) -> None:
    """Every parameter once, as safetensors; tied ones are tied again when loaded."""
    from safetensors.torch import save_file

    tied = set(model._tied_weights_keys or ()) if getattr(model.config, "tie_word_embeddings", False) else set()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items() if k not in tied}, path, metadata={"format": "pt"})
    path.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
