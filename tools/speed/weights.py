"""int4 weights on top of the compressed network: what they save in bytes and time, and what they cost in accuracy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from shapes import Shape, build, compress

from infoprune_export.bundle import graph_file
from infoprune_export.engines.quantise import quantise_graphs
from infoprune_export.graph.export import export_graphs
from infoprune_export.models.families import find_anatomy
from speed import bundles, slices

WEIGHTS = "int4"
STEPS = 240
"""Of training, as in the demo."""


def measure(shape: Shape, work: Path, threads: int, seconds: float, *, quick: bool = False) -> dict[str, Any]:
    """The compressed network with float and with int4 weights.

    Args:
        shape: Of the slices that are timed.
        work: For graphs, engines and a bundle.
        threads: Of ONNX Runtime.
        seconds: For each part.
        quick: tiny-llava at 0.6 without training, and not at 0.33 with the demo's.

    Returns:
        `parts` of the slices, part to `{float, int4, speedup, bytes_ratio}`; `bundle`, of tiny-llava: `size_ratio` of all weight files
        in `onnx/`, `drop_points` (float less int4, mean of the tasks), and `tasks`.
    """
    return {"parts": slice_times(shape, work / "slices", threads, seconds), "bundle": _bundle(work / "bundle", threads, quick)}


def slice_times(shape: Shape, work: Path, threads: int, seconds: float) -> dict[str, Any]:
    """Times of each part with float and with int4 weights, in turn; bytes of its weight file."""
    model = build(shape, torch.device("cpu"), torch.float32)
    anatomy = find_anatomy(model)
    compress(model, shape, slices.FLOPS, each=True)
    export_graphs(model, anatomy, work / "onnx")
    del model
    quantise_graphs(work / "onnx", "fp32", WEIGHTS)
    found = {}
    for part, component, run in slices.PARTS:
        graphs = {"float": work / "onnx" / graph_file(component, "fp32"), WEIGHTS: work / "onnx" / graph_file(component, "q4")}
        times = slices.part_times(run, shape, {side: slices.engine_of(path) for side, path in graphs.items()}, threads, seconds)
        sizes = {side: path.with_name(f"{path.name}_data").stat().st_size for side, path in graphs.items()}
        found[part] = {side: t.model_dump() for side, t in times.items()} | {
            "speedup": times["float"].median_ms / times[WEIGHTS].median_ms,
            "bytes_ratio": sizes[WEIGHTS] / sizes["float"],
        }
    return found


def _bundle(out: Path, threads: int, quick: bool) -> dict[str, Any]:
    budget = ["--flops", "0.6"] if quick else ["--flops", bundles.FLOPS, "--train-steps", STEPS]
    bundles.command("tiny-llava", *budget, "--weights", WEIGHTS, "--target", "ort", "--out", out, "--threads", threads)
    report = json.loads((out / "report.json").read_text())
    size, tasks = report["size"], report["accuracy"]
    return {
        "size_ratio": size["quantised_bytes"] / size["compressed_bytes"],
        "drop_points": 100 * sum(t["compressed"] - t["quantised"] for t in tasks.values()) / len(tasks),
        "tasks": {name: {k: t[k] for k in ("original", "compressed", "quantised", "n")} for name, t in tasks.items()},
    }
