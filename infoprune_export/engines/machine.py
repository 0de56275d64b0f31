"""What this machine is, can build and can run, found out without PyTorch and without starting anything heavy."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from infoprune_export.engines import cuda, flavours
from infoprune_export.memory import CGROUP, Memory, memory, read_small

PACKAGES = (
    "infoprune-export",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "onnx-graphsurgeon",
    "torch",
    "transformers",
)


@dataclass(frozen=True)
class TargetReport:
    """What can be done for a target here; `mend` is the line that changes a no."""

    target: str
    can_build: bool
    can_run: bool
    detail: str
    mend: str | None = None

    def __str__(self) -> str:
        builds, runs = ("yes" if able else "no" for able in (self.can_build, self.can_run))
        return f"build: {builds}, run: {runs} ({self.detail})" + (f"\n{self.mend}" if self.mend else "")


@dataclass(frozen=True)
class MachineReport:
    """What `doctor` prints."""

    system: str
    python: str
    packages: dict[str, str]
    providers: list[str]
    flavours: dict[str, str]
    driver: str | None
    gpus: list[cuda.Gpu]
    cpu: str
    cores: int
    memory: Memory
    disk_free: int
    targets: list[TargetReport]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    def as_rows(self) -> list[tuple[str, str]]:
        """Label and value, for a table."""
        return [
            ("system", self.system),
            ("Python", self.python),
            ("CPU", f"{self.cpu}, {self.cores} {'core' if self.cores == 1 else 'cores'}"),
            ("memory", f"{self.memory.available / 1e9:.1f} of {self.memory.total / 1e9:.1f} GB free"),
            ("disk", f"{self.disk_free / 1e9:.1f} GB free here"),
            ("NVIDIA driver", f"for CUDA {self.driver}" if self.driver else "none"),
            ("GPUs", ", ".join(f"{g.name} ({g.arch}, {g.memory / 1e9:.0f} GB)" for g in self.gpus) or "none"),
            ("ONNX Runtime", ", ".join(self.providers) or "not installed"),
            ("TensorRT", ", ".join(f"{name} {version}" for name, version in self.flavours.items()) or "not installed"),
            *self.packages.items(),
            *((f"target {t.target}", str(t)) for t in self.targets),
        ]

    def description(self) -> dict[str, Any]:
        """The machine as a report names it: what a measured figure depends on, and no host name."""
        return {
            "system": self.system,
            "python": self.python,
            "cpu": self.cpu,
            "cores": self.cores,
            "memory_gb": round(self.memory.total / 1e9, 1),
            "gpus": [f"{g.name} ({g.arch})" for g in self.gpus],
            "driver": self.driver,
            "packages": {**self.packages, **self.flavours},
        }


def machine_report(where: Path = Path(".")) -> MachineReport:
    """Looks at this machine.

    Args:
        where: A directory on the disk whose free space is reported.
    """
    driver = cuda.driver()
    return MachineReport(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        packages=_versions(PACKAGES),
        providers=_providers(),
        flavours={f.name: f.version for f in flavours.installed()},
        driver=driver.version() if driver else None,
        gpus=cuda.gpus(),
        cpu=_cpu_model(),
        cores=cores(),
        memory=memory(),
        disk_free=shutil.disk_usage(where).free,
        targets=[_onnx_target(), _ort_target(), _trt_target()],
    )


def cores() -> int:
    """Cores that this process may use: its affinity, capped by the control group's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = read_small(CGROUP / "cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        allowed = min(allowed, max(1, int(quota) // int(period)))
    return allowed


@cache
def _cpu_model() -> str:
    lines = read_small(Path("/proc/cpuinfo")).splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or "unknown")


def _versions(names: Iterable[str]) -> dict[str, str]:
    """Package to version, of those installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:
        return []
    return onnxruntime.get_available_providers()


def _onnx_target() -> TargetReport:
    able = "torch" in _versions(["torch"]) and "transformers" in _versions(["transformers"])
    mend = None if able else "pip install 'infoprune-export[export]'"
    return TargetReport("onnx", able, True, "compress and export models" if able else "PyTorch and transformers are not installed", mend)


def _ort_target() -> TargetReport:
    providers = _providers()
    able = bool(providers)
    detail = (
        " and ".join(p.removesuffix("ExecutionProvider") for p in providers if p.startswith(("CPU", "CUDA")))
        or "ONNX Runtime is not installed"
    )
    return TargetReport("ort", able, able, detail, None if able else "pip install infoprune-export")


def _trt_target() -> TargetReport:
    present = flavours.installed()
    archs = sorted(
        {a for f in present for a in (*f.ahead_of_time, *(g.arch for g in cuda.gpus() if f.can_build(g.arch)))}, key=lambda a: int(a[2:])
    )
    if not present:
        return TargetReport("trt", False, False, "neither flavour is installed", "pip install 'infoprune-export[trt-rtx]'")
    detail = f"builds for {', '.join(archs)}" if archs else "the flavour tensorrt builds on a GPU, and there is none"
    if not cuda.gpus():
        return TargetReport(
            "trt",
            bool(archs),
            False,
            f"{detail}; no NVIDIA driver here",
            "run on the target, after: pip install 'infoprune-export[trt-rtx]'",
        )
    return TargetReport("trt", bool(archs), True, detail)
