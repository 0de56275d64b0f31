"""A dense request through our engines against the same network in PyTorch, eager and compiled: pixels to the last token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, StaticCache

from infoprune_export.bundle import COMPONENTS, graph_file
from infoprune_export.engines.onnxruntime import OrtEngine
from infoprune_export.engines.onnxruntime import build as build_engine
from infoprune_export.graph.export import export_graphs
from infoprune_export.graph.reference import greedy
from infoprune_export.models.families import find_anatomy
from infoprune_export.models.load import locate
from infoprune_export.recipe import packaged, read
from infoprune_export.runtime.config import ModelConfig
from infoprune_export.runtime.session import Session
from infoprune_export.validation.latency import Inputs, interleave, random_inputs, timed, timing


def measure(recipe: str, work: Path, threads: int, seconds: float) -> dict[str, Any]:
    """Times of one request of a recipe's workload, in turn.

    Args:
        recipe: Name of one whose model is on this machine.
        work: For graphs and engines.
        threads: Of ONNX Runtime and of PyTorch.
        seconds: For all together, compilation not included.

    Returns:
        Times of `ours`, `torch` and `torch_compile`; `over_torch` and `over_torch_compile`, ratios of medians; `tokens` that all
        gave, and `not_measured` with the reason where PyTorch does not compile here.

    Raises:
        InputError: the model is missing; says how to make it.
        RuntimeError: the sides give different tokens.
    """
    source = read(packaged()[recipe])
    workload, located = source.workload, locate(source.model, prepare=source.prepare)
    # As PyTorch's own users load it: the package lays models out so that layers come when their turn does.
    model = LlavaForConditionalGeneration.from_pretrained(located.directory, dtype=torch.float32).eval().requires_grad_(False)
    anatomy = find_anatomy(model)
    export_graphs(model, anatomy, work / "onnx")
    engines = {}
    for name in COMPONENTS:
        graph = graph_file(name, "fp32")
        engines[name] = OrtEngine.open(build_engine(work / "onnx" / graph, work / "ort" / graph), threads)
    session = Session(engines, ModelConfig.from_directory(located.directory))
    inputs = random_inputs(anatomy, workload, session.config.image_token_id)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sides: dict[str, Callable[[], list[int]]] = {
            "ours": lambda: [int(t[0]) for t in session.generate(inputs.input_ids, inputs.pixel_values, workload.new_tokens, ())],
            "torch": lambda: _eager(model, inputs, workload.new_tokens),
        }
        found: dict[str, Any] = {}
        try:
            compiled = _Compiled(model, inputs, workload.new_tokens)
            compiled()
            sides["torch_compile"] = compiled
        except Exception as e:  # a machine without a compiler has the rest measured all the same
            found["not_measured"] = f"torch.compile: {type(e).__name__}: {(str(e).splitlines() or [''])[0][:300]}"
        tokens = {name: run() for name, run in sides.items()}
        if any(x != tokens["ours"] for x in tokens.values()):
            raise RuntimeError(f"the sides give different tokens: {tokens}")
        times = {n: timing(ms) for n, ms in interleave({n: timed(run) for n, run in sides.items()}, seconds=seconds).items()}
    finally:
        torch.set_num_threads(before)
    found |= {name: t.model_dump() for name, t in times.items()} | {"tokens": tokens["ours"]}
    return found | {f"over_{name}": times["ours"].median_ms / t.median_ms for name, t in times.items() if name != "ours"}


def _eager(model: torch.nn.Module, inputs: Inputs, new_tokens: int) -> list[int]:
    pixels = None if inputs.pixel_values is None else torch.from_numpy(inputs.pixel_values)
    return greedy(model, inputs.input_ids[0], pixels, new_tokens, set())[0].tolist()


class _Compiled:
    """The same through torch.compile, with a cache of fixed size, so that prompt and token are compiled once each."""

    def __init__(self, model: torch.nn.Module, inputs: Inputs, new_tokens: int):
        torch.compiler.reset()
        self.ids, self.new_tokens = torch.from_numpy(np.asarray(inputs.input_ids[0]))[None], new_tokens
        self.pixels = None if inputs.pixel_values is None else torch.from_numpy(inputs.pixel_values)
        self.cache = StaticCache(config=model.config.get_text_config(), max_cache_len=self.ids.shape[1] + new_tokens)
        self.forward = torch.compile(model.forward, dynamic=False)

    @torch.inference_mode()
    def __call__(self) -> list[int]:
        self.cache.reset()
        return list(self._tokens())

    def _tokens(self) -> Iterator[int]:
        options = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        step = self.forward(input_ids=self.ids, pixel_values=self.pixels, **options)
        for left in reversed(range(self.new_tokens)):
            token = step.logits[:, -1].argmax(-1, keepdim=True)
            yield int(token)
            if left:
                step = self.forward(input_ids=token, **options)
