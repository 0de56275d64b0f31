"""Where PyTorch computes."""

from __future__ import annotations

import os

import torch

from infoprune_export.errors import InputError, MissingRequirement


def find_device(name: str | None = None) -> torch.device:
    """The device of a name, the best present when None.

    Raises:
        InputError: no device has such a name.
        MissingRequirement: this machine has no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # `accelerate launch` numbers the processes of a machine; each takes the device of its number.
    local = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        device = torch.device("cuda", local) if name == "cuda" else torch.device(name)
    except RuntimeError:
        raise InputError(f"there is no device {name!r}", where="--device", mend="name cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"{name} is not supported", where="--device", mend="name cpu, cuda or cuda:N")
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise MissingRequirement(
                f"--device {device}: PyTorch sees {found or 'no'} NVIDIA GPU{'s' * (found != 1)} here",
                mend="use --device cpu, or install a PyTorch with CUDA and its driver",
            )
    return device
