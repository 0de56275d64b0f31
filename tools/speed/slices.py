"""Slices of LLaVA-1.5-7B, a few layers of each tower at true sizes: how much of the FLOP cut becomes time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from shapes import SHAPES, Shape, build, compress

from infoprune_export.bundle import DECODER, VISION, graph_file
from infoprune_export.engines.onnxruntime import OrtEngine
from infoprune_export.engines.onnxruntime import build as build_engine
from infoprune_export.graph.export import export_graphs
from infoprune_export.models.families import find_anatomy
from infoprune_export.models.flops import count
from infoprune_export.validation.latency import Sample, timed, timing
from infoprune_export.validation.records import Timing
from speed.caches import Decoding
from speed.openings import sampled

FLOPS = 0.33
"""Kept of each part's own."""
ROOM = 16
"""Tokens that a cache has room for behind the prompt."""


def slice_of(layers: int) -> Shape:
    """LLaVA-1.5-7B with so many layers in each tower that are run (CLIP's last one is not)."""
    return replace(SHAPES["llava7b"], name=f"llava7b, {layers} layers", layers=layers, vision_layers=layers + 1)


def measure(shape: Shape, work: Path, threads: int, seconds: float) -> dict[str, Any]:
    """Times of the parts, dense and compressed in turn and opened several times, and what of their FLOPs and bytes is kept.

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
        name = graph_file(component, "fp32")
        engines = {side: engine_of(work / side / name) for side in ("dense", "compressed")}
        times = part_times(run, shape, engines, threads, seconds)
        if part == "decode":
            read = {
                side: path.with_name(f"{name}_data").stat().st_size + _cache_bytes(path, shape.prompt) for side, path in engines.items()
            }
            share = read["compressed"] / read["dense"]
        else:
            parts = ("vision", "projector") if part == "vision" else (part,)
            share = sum(kept[p] for p in parts) / sum(whole[p] for p in parts)
        speedup = times["dense"].median_ms / times["compressed"].median_ms
        figures = {side: t.model_dump() for side, t in times.items()}
        found[part] = figures | {"speedup": speedup, "kept": share, "efficiency": speedup * share}
    return {"parts": found}


Run = Callable[[OrtEngine, Shape], Sample]


def engine_of(graph: Path) -> Path:
    """The engine of a graph, built where it is not there yet."""
    out = graph.parent / "ort" / graph.name
    return out if out.is_file() else build_engine(graph, out)


def part_times(run: Run, shape: Shape, engines: Mapping[str, Path], threads: int, seconds: float) -> dict[str, Timing]:
    """Times of one part on several engines."""
    samples = sampled(list(engines), lambda side: run(OrtEngine.open(engines[side], threads), shape), seconds=seconds, warmup_rounds=1)
    return {side: timing(ms) for side, ms in samples.items()}


def _vision(engine: OrtEngine, shape: Shape) -> Sample:
    pixels = np.random.default_rng(0).standard_normal((1, 3, shape.image, shape.image), dtype=np.float32)
    return timed(lambda: engine.run({"pixel_values": pixels}))


def _prefill(engine: OrtEngine, shape: Shape) -> Sample:
    return Decoding(engine, shape.hidden, shape.prompt + ROOM).prefill(shape.prompt)


def _decode(engine: OrtEngine, shape: Shape) -> Sample:
    request = Decoding(engine, shape.hidden, shape.prompt + ROOM)
    return request.decode(shape.prompt, request.read(shape.prompt)[1])


def _cache_bytes(decoder: Path, tokens: int) -> int:
    """Of the keys and values of so many tokens, in float32."""
    inputs = onnx.load(decoder, load_external_data=False).graph.input
    caches = [x.type.tensor_type.shape.dim for x in inputs if x.name.startswith("past_key_values.")]
    return 4 * tokens * sum(dim[1].dim_value * dim[3].dim_value for dim in caches)


PARTS: tuple[tuple[str, str, Run], ...] = (("vision", VISION, _vision), ("prefill", DECODER, _prefill), ("decode", DECODER, _decode))
"""What is timed: its name, its component, and what makes a sample of an engine."""
