"""Low-rank updates for models whose whole matrices are too many to train."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from infoprune_export.errors import MissingRequirement


class Adapters:
    """Low-rank updates (LoRA, Hu et al. 2021) of linear maps through `peft`; low-rank pairs get one on each of their maps.

    Args:
        model: Frozen; changed in place.
        paths: The maps.
        rank: Of each update.
        seed: For the updates' first factors; the second ones begin at zero.

    Raises:
        MissingRequirement: `peft` is not installed.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], rank: int, seed: int):
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise MissingRequirement("recovery by LoRA needs peft", mend='pip install "infoprune-export[train]"') from None
        self.model = model
        self.linears = [
            name for path in paths for name, m in model.get_submodule(path).named_modules(prefix=path) if isinstance(m, nn.Linear)
        ]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=self.linears, bias="none")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model)

    def merge(self) -> None:
        """Adds the updates to the maps and takes the adapters away."""
        for name in self.linears:
            adapted = self.model.get_submodule(name)
            adapted.merge()
            self.model.set_submodule(name, adapted.get_base_layer())
