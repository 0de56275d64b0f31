"""Decoders with a cache in place, ready to be timed: a prompt, or one token behind a prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from shapes import Shape, build

from infoprune_export.bundle import DECODER, graph_file
from infoprune_export.engines.base import CacheBuffers, Step
from infoprune_export.engines.cache_buffers import OrtCacheBuffers
from infoprune_export.engines.onnxruntime import OrtEngine
from infoprune_export.engines.onnxruntime import build as build_engine
from infoprune_export.graph.export import export_graphs
from infoprune_export.models.families import find_anatomy
from infoprune_export.validation.latency import timed


class Decoding:
    """One request on a decoder's engine, batch 1, random embeddings."""

    def __init__(self, engine: OrtEngine, hidden: int, capacity: int):
        """
        Args:
            engine: Of a decoder that works on its cache in place.
            hidden: Width of the embeddings.
            capacity: Tokens that the cache has room for.
        """
        self.engine, self.hidden = engine, hidden
        self.buffers: CacheBuffers = OrtCacheBuffers(engine, 1, capacity)
        self._names = {x.name for x in engine.inputs}

    def read(self, tokens: int, past: int = 0, behind: Step | None = None) -> tuple[np.ndarray, Step]:
        """Logits after so many tokens behind a past, and the step."""
        feeds = {
            "inputs_embeds": np.random.default_rng(past).standard_normal((1, tokens, self.hidden), dtype=np.float32),
            "attention_mask": np.ones((1, past + tokens), np.int64),
            "position_ids": np.arange(past, past + tokens)[None],
        }
        return self.buffers.run({name: x for name, x in feeds.items() if name in self._names}, behind)

    def prefill(self, tokens: int) -> Callable[[], float]:
        """Milliseconds of a prompt."""
        return timed(lambda: self.read(tokens))

    def decode(self, past: int, behind: Step) -> Callable[[], float]:
        """Milliseconds of one token behind so many."""
        return timed(lambda: self.read(1, past, behind))


def dense_engine(shape: Shape, work: Path, threads: int) -> tuple[torch.nn.Module, OrtEngine]:
    """A network with random weights, and the engine of its decoder as a bundle has it."""
    model = build(shape, torch.device("cpu"), torch.float32)
    export_graphs(model, find_anatomy(model), work / "onnx")
    name = graph_file(DECODER, "fp32")
    return model, OrtEngine.open(build_engine(work / "onnx" / name, work / "ort" / name), threads)
