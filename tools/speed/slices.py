"""Slices of LLaVA-1.5-7B, a few layers of each tower at true sizes: how much of the FLOP cut becomes time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import SHAPES, Shape, build, compress

from infoprune_export.bundle import DECODER, VISION, graph_file
from infoprune_export.engines.onnxruntime import OrtEngine
from infoprune_export.engines.onnxruntime import build as build_engine
from infoprune_export.graph.export import export_graphs
from infoprune_export.models.families import find_anatomy
from infoprune_export.models.flops import count
from infoprune_export.validation.latency import interleave, timed, timing
from speed.caches import Decoding

FLOPS = 0.33
"""Kept of each part's own."""
ROOM = 16
"""Tokens that a cache has room for behind the prompt."""


def slice_of(layers: int) -> Shape:
    """LLaVA-1.5-7B with so many layers in each tower that are run (CLIP's last one is not)."""
    return replace(SHAPES["llava7b"], name=f"llava7b, {layers} layers", layers=layers, vision_layers=layers + 1)


def measure(shape: Shape, work: Path, threads: int, seconds: float) -> dict[str, Any]:
    """Times of the parts, dense and compressed in turn, and what of their FLOPs and bytes is kept.

    Args:
        shape: Of the networks.
        work: For graphs and engines, some GB.
        threads: Of ONNX Runtime.
        seconds: For each part.

    Returns:
        `parts`, part to `{dense, compressed, speedup, kept, efficiency}`: `kept` is of FLOPs; for decode, which waits for memory,
        of the bytes that a token reads (weights and cache). Efficiency is speed-up times what is kept: 1 where time falls as they do.
    """
    model = build(shape, torch.device("cpu"), torch.float32)
    anatomy = find_anatomy(model)
    export_graphs(model, anatomy, work / "dense")
    plan = compress(model, shape, FLOPS, each=True)
    export_graphs(model, anatomy, work / "compressed")
    del model
    whole, kept = (count(anatomy, plan.workload, p).parts() for p in (None, plan))
    found = {}
    for part, component, run in PARTS:
        sides, read = {}, {}
        for name in ("dense", "compressed"):
            path = work / name / "ort" / graph_file(component, "fp32")
            if not path.is_file():
                build_engine(work / name / path.name, path)
            engine = OrtEngine.open(path, threads)
            sides[name], cache = run(engine, shape)
            read[name] = path.with_name(f"{path.name}_data").stat().st_size + cache
        times = {name: timing(ms) for name, ms in interleave(sides, seconds=seconds, warmup_rounds=1).items()}
        if part == "decode":
            share = read["compressed"] / read["dense"]
        else:
            parts = ("vision", "projector") if part == "vision" else (part,)
            share = sum(kept[p] for p in parts) / sum(whole[p] for p in parts)
        speedup = times["dense"].median_ms / times["compressed"].median_ms
        figures = {name: t.model_dump() for name, t in times.items()}
        found[part] = figures | {"speedup": speedup, "kept": share, "efficiency": speedup * share}
    return {"parts": found}


def _vision(engine: OrtEngine, shape: Shape) -> tuple[Callable[[], float], int]:
    pixels = np.random.default_rng(0).standard_normal((1, 3, shape.image, shape.image), dtype=np.float32)
    return timed(lambda: engine.run({"pixel_values": pixels})), 0


def _prefill(engine: OrtEngine, shape: Shape) -> tuple[Callable[[], float], int]:
    return Decoding(engine, shape.hidden, shape.prompt + ROOM).prefill(shape.prompt), 0


def _decode(engine: OrtEngine, shape: Shape) -> tuple[Callable[[], float], int]:
    request = Decoding(engine, shape.hidden, shape.prompt + ROOM)
    _, step = request.read(shape.prompt)
    widths = [x.shape[1] * x.shape[3] * x.dtype.itemsize for x in engine.inputs if x.name.startswith("past_key_values.")]
    return request.decode(shape.prompt, step), shape.prompt * sum(widths)


PARTS = (("vision", VISION, _vision), ("prefill", DECODER, _prefill), ("decode", DECODER, _decode))
"""What is timed: its name, its component, and what makes a sample of an engine."""
