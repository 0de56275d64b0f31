"""Where PyTorch computes."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from infoprune_export.errors import InputError, MissingRequirement, NotEnough


def device_with_room(name: str | None, needed: int, note: Callable[[str], None]) -> torch.device:
    """The device of a name, if so many bytes fit there; without a name the CPU where the GPU is too small.

    Args:
        name: See `find_device`.
        needed: Bytes on a GPU; what the CPU needs is looked at when the model is loaded.
        note: Gets a line where the CPU is taken though there is a GPU.

    Raises:
        NotEnough: the device that was named has less memory free.
        InputError, MissingRequirement: see `find_device`.
    """
    device = find_device(name)
    if device.type == "cpu":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    if needed <= free:
        return device
    lack = f"this takes about {needed / 2**30:.1f} GiB on {device}, where {free / 2**30:.1f} GiB are free"
    if name is not None:
        raise NotEnough(lack, where="--device", mend="use --device cpu, or a GPU with more memory")
    note(f"{lack}: computing on the CPU")
    return torch.device("cpu")


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
