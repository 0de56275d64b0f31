"""Tensors that wait on disk between two passes over a model, in a folder for each group of them.

A group stands under its name when all of it is written and not before, so a walk that was killed goes on after the last
whole one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SUFFIX = ".safetensors"


class Spill:
    """Groups of named tensors.

    Args:
        directory: Made when first written to.
    """

    def __init__(self, directory: Path):
        self.directory = directory

    def has(self, group: str) -> bool:
        return (self.directory / group).is_dir()

    def put(self, group: str, tensors: Iterable[tuple[object, Tensor]]) -> None:
        """Writes a group; one of that name is replaced."""
        place, part = self.directory / group, self.directory / f".{group}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, tensor in tensors:
            save_file({"": tensor.detach().contiguous().cpu()}, part / f"{name}{SUFFIX}")
        shutil.rmtree(place, ignore_errors=True)
        os.rename(part, place)

    def get(self, group: str, name: object, device: torch.device | str = "cpu") -> Tensor | None:
        """A tensor of a whole group; None where the group has none of that name."""
        path = self.directory / group / f"{name}{SUFFIX}"
        return load_file(path)[""].to(device) if path.is_file() else None

    def drop(self, group: str) -> None:
        """Removes a group that nobody needs any more, if it is there."""
        shutil.rmtree(self.directory / group, ignore_errors=True)
