"""Slices of LLaVA-1.5-7B, a few layers of each tower at true sizes: how much of the FLOP cut becomes time."""

from __future__ import annotations

import time
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
from infoprune_export.validation.latency import interleave, timing

FLOPS = 0.33
"""Kept of each part's own."""


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
    return _timed(engine, {"pixel_values": _random(1, 3, shape.image, shape.image)}), 0


def _prefill(engine: OrtEngine, shape: Shape) -> tuple[Callable[[], float], int]:
    return _timed(engine, _feeds(engine, shape, shape.prompt, 0)), 0


def _decode(engine: OrtEngine, shape: Shape) -> tuple[Callable[[], float], int]:
    feeds = _feeds(engine, shape, 1, shape.prompt)
    return _timed(engine, feeds), sum(a.nbytes for name, a in feeds.items() if name.startswith("past"))


def _feeds(engine: OrtEngine, shape: Shape, tokens: int, past: int) -> dict[str, np.ndarray]:
    feeds = {
        "inputs_embeds": _random(1, tokens, shape.hidden),
        "attention_mask": np.ones((1, past + tokens), np.int64),
        "position_ids": np.arange(past, past + tokens)[None],
    }
    for x in engine.inputs:
        if x.name not in feeds:
            feeds[x.name] = _random(1, int(x.shape[1]), past, int(x.shape[3]))
    return feeds


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _timed(engine: OrtEngine, feeds: dict[str, np.ndarray]) -> Callable[[], float]:
    def sample() -> float:
        start = time.perf_counter()
        engine.run(feeds)
        return 1e3 * (time.perf_counter() - start)

    return sample


PARTS = (("vision", VISION, _vision), ("prefill", DECODER, _prefill), ("decode", DECODER, _decode))
"""What is timed: its name, its component, and what makes a sample of an engine."""
