"""The two flavours of TensorRT, one Python API: which are installed, and what each can build where.

`tensorrt` times kernels on the GPU in front of it and builds for that one. `tensorrt-rtx` compiles
kernels on the device at run time, so its builder needs neither a GPU nor a driver, and knows the
architectures of its own list only.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from infoprune_export.engines.cuda import gpus
from infoprune_export.errors import InputError, MissingRequirement

MODULES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
"""Flavour to module names; the bindings wheel alone has the same contents as `tensorrt_rtx` and loads its libraries itself."""

EXTRAS = {"tensorrt": "trt", "tensorrt-rtx": "trt-rtx"}
DEFAULT_ARCHS = ("sm80", "sm86", "sm89", "sm120")
ON_THE_DEVICE = "on the device: pip install 'infoprune-export[trt]' && infoprune-export build DIR --target trt"


@dataclass(frozen=True)
class Flavour:
    """An installed flavour of TensorRT."""

    name: str
    module: ModuleType

    @property
    def version(self) -> str:
        return self.module.__version__

    @property
    def ahead_of_time(self) -> tuple[str, ...]:
        """Architectures that it builds for on a machine without a GPU."""
        if self.name != "tensorrt-rtx":
            return ()
        known = self.module.ComputeCapability.__members__
        return tuple(name.lower() for name in known if name.startswith("SM"))

    @property
    def times_kernels(self) -> bool:
        """Whether it times kernels when it builds, and so has a timing cache; TensorRT-RTX chooses them when it runs."""
        return self.name == "tensorrt"

    @property
    def copies_weights(self) -> bool:
        """Whether an engine holds its weights once for every profile."""
        return self.name == "tensorrt-rtx"

    @property
    def builds_for(self) -> tuple[str, ...]:
        """Architectures that it builds for on this machine: `tensorrt` works on the first GPU, whatever others there are."""
        return tuple(gpu.arch for gpu in gpus()[:1]) if self.name == "tensorrt" else self.ahead_of_time

    def can_build(self, arch: str) -> bool:
        """Whether it builds for an architecture on this machine."""
        return arch in self.builds_for


@functools.cache
def installed() -> tuple[Flavour, ...]:
    """The flavours that can be imported here."""
    found = []
    for name, modules in MODULES.items():
        for module in modules:
            try:
                found.append(Flavour(name, importlib.import_module(module)))
                break
            except (ImportError, OSError):  # OSError and ImportError: its shared libraries are not there
                continue
    return tuple(found)


def find_flavour(preferred: str | None = None) -> Flavour:
    """The flavour to work with on this machine.

    Args:
        preferred: `tensorrt` or `tensorrt-rtx`. When None, `tensorrt` where it is installed and has a GPU, else `tensorrt-rtx`.

    Raises:
        InputError: no flavour of that name.
        MissingRequirement: it is not installed, or needs a GPU that is not here.
    """
    if preferred is not None and preferred not in MODULES:
        raise InputError(f"TensorRT has no flavour {preferred!r}", mend=f"flavours are {' and '.join(MODULES)}")
    name = preferred or ("tensorrt" if gpus() and any(f.name == "tensorrt" for f in installed()) else "tensorrt-rtx")
    flavour = next((f for f in installed() if f.name == name), None)
    if flavour is None:
        raise MissingRequirement(f"{name} is not installed", mend=f"pip install 'infoprune-export[{EXTRAS[name]}]'")
    if name == "tensorrt" and not gpus():
        raise MissingRequirement("the flavour tensorrt builds on a GPU, and this machine has none", mend=ON_THE_DEVICE)
    return flavour


def flavour_for(archs: Sequence[str]) -> Flavour:
    """The flavour that builds for all of some architectures on this machine.

    Raises:
        MissingRequirement: no flavour is installed, or none builds for them all; names the first that it cannot.
    """
    usual = find_flavour()
    for flavour in (usual, *installed()):
        if all(flavour.can_build(arch) for arch in archs):
            return flavour
    check_archs(usual, archs)
    return usual


def parse_arch(text: str) -> str:
    """`sm86` from `sm86`, `SM_86`, `86` or `8.6`.

    Raises:
        InputError: when it is no architecture.
    """
    match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text.strip().lower())
    if not match:
        raise InputError(f"{text!r} is not a GPU architecture", mend=f"write it as in {', '.join(DEFAULT_ARCHS)}")
    return f"sm{match[1]}{match[2]}"


def default_archs() -> list[str]:
    """Architectures of the GPUs present, without repeats; a fixed list on a machine without one. `tensorrt` builds for the first GPU alone.

    Raises:
        MissingRequirement: see `find_flavour`.
    """
    usual = find_flavour()
    present = usual.builds_for if usual.name == "tensorrt" else (gpu.arch for gpu in gpus())
    return list(dict.fromkeys(present)) or list(DEFAULT_ARCHS)


def check_archs(flavour: Flavour, archs: Sequence[str]) -> None:
    """Makes sure that a flavour builds for every architecture here, before any work is done.

    Raises:
        MissingRequirement: naming the first architecture that it cannot build for.
    """
    for arch in archs:
        if flavour.can_build(arch):
            continue
        able, present = ", ".join(flavour.builds_for), [gpu.arch for gpu in gpus()]
        if flavour.name == "tensorrt" and arch in present:
            what = f"tensorrt builds on the first GPU of this machine, and that is for {able}, not for {arch}"
            raise MissingRequirement(what, mend=f"make the other one the first: set CUDA_VISIBLE_DEVICES={present.index(arch)}")
        raise unsupported(flavour, arch, f"here it builds for {able}")


def unsupported(flavour: Flavour, arch: str, why: str) -> MissingRequirement:
    """The error for an architecture that only the device itself can build for."""
    return MissingRequirement(
        f"{flavour.name} {flavour.version} cannot build for {arch} ({why}): {arch} needs the flavour tensorrt", mend=ON_THE_DEVICE
    )
