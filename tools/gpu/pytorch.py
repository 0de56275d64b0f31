"""Prefill, decode and vision tower in PyTorch: dense against compressed, eager, as CUDA graphs, compiled."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from shapes import Shape, build, compress
from torch import Tensor, nn

FLOPS = 0.33
CAPACITY = 64
"""Tokens that a decoding cache holds beyond the prompt."""
MODES = ("eager", "cuda_graphs", "compile")
"""As it comes; captured once and replayed; compiled by Inductor, then captured. The cheapest to measure first."""
PARTS = ("decode", "prefill", "vision")


def measure(shape: Shape, device: torch.device, batches: tuple[int, ...], modes: list[str], done: Callable[[], bool]) -> dict[str, Any]:
    """Milliseconds, tokens per second and memory of both networks.

    Args:
        shape: Of the networks.
        device: Where they run; in float16 on a GPU, float32 on the CPU.
        batches: Batch sizes.
        modes: Names in `MODES`.
        done: Whether time is up; what is left then is not measured.

    Returns:
        `dtype`; `kept`, the fraction of FLOPs of the compressed network; `weights_gib` of both; `times`, part to batch to mode to
        `{dense, compressed, speedup}`, or to `{failed}` with the reason.
    """
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    networks = {name: build(shape, device, dtype) for name in ("dense", "compressed")}
    plan = compress(networks["compressed"], shape, FLOPS)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    weights = {name: sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30 for name, model in networks.items()}
    times: dict[str, Any] = {}
    for mode, batch, part in _order(modes, batches):
        if done():
            break
        try:
            sides = {name: _figures(model, shape, part, batch, mode) for name, model in networks.items()}
            found = sides | {"speedup": sides["dense"]["median_ms"] / sides["compressed"]["median_ms"]}
        except Exception as e:  # a mode that this machine cannot do, such as one without a compiler, must not cost the others
            found = {"failed": f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:300]}"}
        times.setdefault(part, {}).setdefault(str(batch), {})[mode] = found
    return {"dtype": str(dtype).removeprefix("torch."), "kept": plan.budget.predicted, "weights_gib": weights, "times": times}


def _order(modes: list[str], batches: tuple[int, ...]) -> Iterator[tuple[str, int, str]]:
    """What costs little first, then what says most: compiling takes a minute each."""
    for mode in modes:
        for batch in batches:
            for part in PARTS:
                yield mode, batch, part


@torch.no_grad()
def _figures(model: nn.Module, shape: Shape, part: str, batch: int, mode: str) -> dict[str, float]:
    cuda = next(model.parameters()).is_cuda
    torch.compiler.reset()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    run, tokens = {"vision": _vision, "prefill": _prefill, "decode": _decode}[part](model, shape, batch, mode)
    found = _time(run if mode == "eager" else _captured(run), cuda)
    found["tokens_per_second"] = 1e3 * tokens / found["median_ms"]
    if cuda:
        found["beside_weights_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return found


def _compiled(run: Callable, mode: str) -> Callable:
    return torch.compile(run, dynamic=False) if mode == "compile" else run


def _captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A run as one CUDA graph, which replays its kernels without asking Python for each."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # what is made at first use must not be captured
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def _vision(model: nn.Module, shape: Shape, batch: int, mode: str) -> tuple[Callable[[], Tensor], int]:
    weight = next(model.parameters())
    pixels = torch.randn(batch, 3, shape.image, shape.image, device=weight.device, dtype=weight.dtype)
    forward = _compiled(lambda x: model.model.vision_tower(x).last_hidden_state, mode)
    return lambda: forward(pixels), batch * (shape.image // shape.patch) ** 2


def _prefill(model: nn.Module, shape: Shape, batch: int, mode: str) -> tuple[Callable[[], Tensor], int]:
    embeds = _embeds(model, shape, batch, shape.prompt)

    def forward(x: Tensor) -> Tensor:
        return model.lm_head(model.model.language_model(inputs_embeds=x, use_cache=False).last_hidden_state[:, -1:])

    forward = _compiled(forward, mode)
    return lambda: forward(embeds), batch * shape.prompt


def _decode(model: nn.Module, shape: Shape, batch: int, mode: str) -> tuple[Callable[[], Tensor], int]:
    """One token behind a prompt; the cache is wound back after each, so that every run is the same."""
    from transformers import StaticCache

    language = model.model.language_model
    cache = StaticCache(config=language.config, max_cache_len=shape.prompt + CAPACITY)
    language(inputs_embeds=_embeds(model, shape, batch, shape.prompt), past_key_values=cache, use_cache=True)
    embeds = _embeds(model, shape, batch, 1)

    def forward(x: Tensor) -> Tensor:
        return model.lm_head(language(inputs_embeds=x, past_key_values=cache, use_cache=True).last_hidden_state)

    forward = _compiled(forward, mode)

    def run() -> Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(shape.prompt)
        return forward(embeds)

    return run, batch


def _embeds(model: nn.Module, shape: Shape, batch: int, tokens: int) -> Tensor:
    weight = next(model.parameters())
    return torch.randn(batch, tokens, shape.hidden, device=weight.device, dtype=weight.dtype)


def _time(run: Callable[[], Tensor], cuda: bool, rounds: int = 20, warm_up: int = 3) -> dict[str, float]:
    """Order statistics of a run, warm; on a GPU by events.

    Raises:
        FloatingPointError: what it computes is not finite.
    """
    for _ in range(warm_up):
        out = run()
    if not torch.isfinite(out.float()).all():
        raise FloatingPointError("the network's output is not finite")
    taken = []
    for _ in range(rounds):
        if cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            run()
            taken.append(1e3 * (time.perf_counter() - start))
    return {"median_ms": statistics.median(taken), "min_ms": min(taken), "max_ms": max(taken), "n": rounds}
