"""Mixed precision and the processes of a launch, as the training loop sees them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from infoprune_export.errors import MissingRequirement


class OneProcess:
    """One process in full precision: what of accelerate's interface the loop needs then."""

    num_processes, process_index, is_main_process = 1, 0, True
    autocast = nullcontext


def make_accelerator(device: torch.device) -> Any:
    """Mixed precision on CUDA, and the other processes of a launch.

    Raises:
        MissingRequirement: `accelerate` is not installed.
    """
    try:
        from accelerate import Accelerator
    except ImportError:
        raise MissingRequirement("training needs accelerate", mend='pip install "infoprune-export[train]"') from None
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if half else "no")
