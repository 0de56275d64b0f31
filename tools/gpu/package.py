"""The package itself on a GPU, through its command line: training, ONNX Runtime on CUDA, TensorRT engines built and run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def train(device: str, work: Path, seconds: float) -> dict[str, Any]:
    """Compresses and trains tiny-llava on a device: do statistics, factors and training run there, and what do they cost?"""
    out = work / "trained"
    begin = time.monotonic()
    _command("tiny-llava", "--flops", "0.33", "--train-steps", "40", "--target", "onnx", "--device", device, "--out", out, seconds=seconds)
    report = json.loads((out / "report.json").read_text())
    return {
        "seconds": time.monotonic() - begin,
        "training": report["training"],
        "accuracy": {task: {k: a[k] for k in ("original", "compressed", "n")} for task, a in report["accuracy"].items()},
        "numerics_passed": report["gates"]["numerics"]["passed"],
    }


def engines(targets: list[str], work: Path, seconds: float) -> dict[str, Any]:
    """Builds and validates tiny-llava's engines: agreement with PyTorch, latency, and what could not be measured."""
    out = work / "engines"
    flags = [x for t in targets for x in ("--target", t)]
    _command("tiny-llava", "--flops", "0.6", *flags, "--out", out, seconds=seconds)
    report = json.loads((out / "report.json").read_text())
    return {k: report[k] for k in ("numerics", "latency", "accuracy", "not_measured", "machine")}


def _command(*arguments: object, seconds: float) -> None:
    """Runs the command line of this checkout.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    line = [sys.executable, "-m", "infoprune_export", *map(str, arguments), "--quiet"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode not in (0, 1):  # 1: a gate failed, and the report says which
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-1500:]}")
