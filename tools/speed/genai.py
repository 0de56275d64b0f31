"""Our dense decoder against the graph that onnxruntime-genai's builder writes for the very same Llama.

Both run on the same ONNX Runtime with the same settings, each with its cache in place; the builder's graph takes embeddings and
gives the last position's logits, as ours does.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from shapes import SHAPES, Shape

from infoprune_export.engines.onnxruntime import OrtEngine
from infoprune_export.errors import MissingRequirement
from infoprune_export.validation.latency import Sample, timing
from speed.caches import Decoding, dense_engine
from speed.openings import sampled

PROMPT = 624
"""Tokens that are read, and behind which one is decoded."""
PARTS: dict[str, Callable[[Decoding, int], Sample]] = {
    "prefill": lambda request, prompt: request.prefill(prompt),
    "decode": lambda request, prompt: request.decode(prompt, request.read(prompt)[1]),
}
TOLERANCE = 1e-3
"""Of the largest logit: what two ways of summing in float32 may differ by."""
DENSE = replace(SHAPES["small"], name="dense", hidden=768, layers=8, heads=12, ffn=2048, vocabulary=4096, prompt=PROMPT)
DENSE_7B = replace(SHAPES["small"], name="dense7b", hidden=4096, layers=2, heads=32, ffn=11008, vocabulary=32064, prompt=PROMPT)
TOKENIZER = Path(__file__).resolve().parents[2] / "infoprune_export" / "models" / "tiny_llava"
"""The builder copies one; it does nothing to the graph."""


def measure(shape: Shape, work: Path, threads: int, seconds: float) -> dict[str, Any]:
    """Times of prefill and decode of both graphs, in turn and opened several times.

    Args:
        shape: Of the language model.
        work: For graphs and engines.
        threads: Of ONNX Runtime.
        seconds: For each part.

    Returns:
        `parts`, part to `{ours, genai, over_genai}`, the ratio of medians; `difference`, of the logits, relative to the largest.

    Raises:
        MissingRequirement: onnxruntime-genai is not installed.
        RuntimeError: the builder failed, or the two graphs do not compute the same.
    """
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise MissingRequirement("onnxruntime-genai is not installed", mend='pip install "infoprune-export[dev]"')
    model, engine = dense_engine(shape, work, threads)
    paths = {"ours": engine.path, "genai": _built(model, shape, work)}
    del model, engine
    difference = _difference({name: _request(path, shape, threads) for name, path in paths.items()}, shape.prompt)
    found = {}
    for part, run in PARTS.items():
        samples = sampled(list(paths), lambda name, run=run: run(_request(paths[name], shape, threads), shape.prompt), seconds=seconds)
        times = {name: timing(ms) for name, ms in samples.items()}
        found[part] = {n: t.model_dump() for n, t in times.items()} | {"over_genai": times["ours"].median_ms / times["genai"].median_ms}
    return {"parts": found, "difference": difference}


def _request(engine: Path, shape: Shape, threads: int) -> Decoding:
    return Decoding(OrtEngine.open(engine, threads), shape.hidden, shape.prompt + 16)


def _difference(requests: dict[str, Decoding], prompt: int) -> float:
    """Of the logits, relative to the largest.

    Raises:
        RuntimeError: it is more than rounding.
    """
    logits = {name: _logits(x, prompt) for name, x in requests.items()}
    difference = float(np.abs(logits["ours"] - logits["genai"]).max() / np.abs(logits["genai"]).max())
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the two graphs do not compute the same: logits differ by {difference:.1e} of the largest")
    return difference


def _logits(request: Decoding, prompt: int) -> np.ndarray:
    first, step = request.read(prompt)
    return np.stack([first.ravel(), request.read(1, prompt, step)[0].ravel()])


def _built(model: torch.nn.Module, shape: Shape, work: Path) -> Path:
    """The builder's graph of a network's language model."""
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM(model.config.text_config)
    llama.model, llama.lm_head = model.model.language_model, model.lm_head
    checkpoint, out = work / "llama", work / "genai"
    llama.save_pretrained(checkpoint)
    for file in TOKENIZER.glob("tokenizer*.json"):
        shutil.copy(file, checkpoint)
    line = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", out, "-p", "fp32", "-e", "cpu"]
    options = ["-c", work / "cache", "--extra_options", "exclude_embeds=true", "prune_lm_head=true"]
    # From its own directory: the builder's modules have names that a working directory may have, too.
    done = subprocess.run(
        [*map(str, [*line, *options])], capture_output=True, text=True, check=False, cwd=work, env=os.environ | {"TQDM_DISABLE": "1"}
    )
    if done.returncode:
        raise RuntimeError(f"onnxruntime-genai's builder: {done.stderr[-1500:]}")
    shutil.rmtree(checkpoint)
    return _with_head_size(out / "model.onnx", shape.hidden // shape.heads)


def _with_head_size(path: Path, head_dim: int) -> Path:
    """The graph with the width of its cache written where the builder has a name for it."""
    graph = onnx.load(path, load_external_data=False)
    for value in graph.graph.input:
        if value.name.startswith("past_key_values."):
            value.type.tensor_type.shape.dim[3].dim_value = head_dim
    onnx.save(graph, path)
    return path
