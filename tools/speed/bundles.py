"""Whole bundles of the project's own models: a request from pixels to the last token, compressed against original."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FLOPS = "0.33"


def measure(recipe: str, work: Path, threads: int, seconds: float) -> dict[str, Any]:
    """Makes a bundle without training, which does not change its speed, and times it through the command line.

    Args:
        recipe: Name of the recipe.
        work: Where the bundle goes.
        threads: Of ONNX Runtime.
        seconds: For each part.

    Returns:
        What `bench --json` says.

    Raises:
        RuntimeError: with the end of what the command said.
    """
    out = work / recipe
    if not out.is_dir():
        command(recipe, "--flops", FLOPS, "--target", "ort", "--out", out, "--threads", threads)
    return json.loads(command("bench", out, "--engine", "ort", "--threads", threads, "--seconds", seconds, "--json"))


def command(*arguments: object) -> str:
    """Runs the command line, quietly, and returns what it wrote to stdout.

    Raises:
        RuntimeError: with the end of what it said.
    """
    line = [sys.executable, "-m", "infoprune_export", *map(str, arguments), "--quiet"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-1500:]}")
    return done.stdout
