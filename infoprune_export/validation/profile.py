"""A model's time table, measured on this machine: `bench --profile-layers`, and what `--latency` allocates by.

Every distinct attention block is timed against its kept groups, every distinct feed-forward matrix dense and as a pair, at the token
counts of the workload; sizes of one shape take turns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from infoprune_export.engines import stacks
from infoprune_export.engines.base import Engine
from infoprune_export.models.anatomy import Layer, Linear
from infoprune_export.runtime.session import PAST
from infoprune_export.timetable import PARTS_OF, Curve, Matrix, Part, PartName, TimeTable, attention_key, matrix_key
from infoprune_export.validation.latency import Sample, interleave, timed
from infoprune_export.validation.stand_ins import Setting, original_times

SHARES = (0.05, 0.25, 0.5, 0.75, 1.0)
"""Of an attention block's groups, and of the rank at which a pair has the FLOPs of its dense matrix."""
RANK_MULTIPLE = 8
STACK_BYTES = 2**28
"""Weights of the copies of a part that are timed together: enough to be read from memory as in a network."""
Progress = Callable[[str, int, int], None]


def measure_table(setting: Setting, seconds: float = 3.0, progress: Progress = lambda what, done, total: None) -> TimeTable:
    """Measures everything.

    Args:
        setting: Model, workload, type and threads.
        seconds: For each shape in each part, and for each part of the whole; no less than three rounds.
        progress: Told how many shapes are done, and of how many.
    """
    parts = {name: Part(passes=n, whole=0, attention={}, matrices={}) for name, n in setting.passes.items()}
    work = [(name, setting.anatomy.tower(tower).layers) for tower, names in PARTS_OF.items() for name in names if name in parts]
    total, done = sum(len(_shapes(layers)) for _, layers in work) + 1, 0
    with tempfile.TemporaryDirectory() as directory:
        for name, layers in work:
            for key, (shape, times) in _shapes(layers).items():
                progress("timing layers", done, total)
                if isinstance(shape, Layer):
                    parts[name].attention[key] = _attention(setting, name, shape, times, Path(directory), seconds)
                else:
                    parts[name].matrices[key] = _matrix(setting, name, shape, times, Path(directory), seconds)
                done += 1
        progress("timing layers", done, total)
    whole = original_times(setting, seconds)
    for name, part in parts.items():
        part.whole = whole[name]
    progress("timing layers", total, total)
    return TimeTable(conditions=setting.conditions(), parts=parts, end_to_end=whole["end_to_end"])


def _shapes(layers: Sequence[Layer]) -> dict[str, tuple[Layer | Linear, int]]:
    """Key of every distinct shape to one that has it, and how many have."""
    found: dict[str, tuple[Layer | Linear, int]] = {}
    for layer in layers:
        for key, thing in ((attention_key(layer), layer), *((matrix_key(m), m) for m in layer.ffn.matrices.values())):
            found[key] = (thing, found.get(key, (thing, 0))[1] + 1)
    return found


def _attention(setting: Setting, part: PartName, layer: Layer, copies: int, directory: Path, seconds: float) -> Curve:
    a = layer.attention
    copies = _copies(setting, copies, 4 * a.q.d_in * a.heads * a.head_dim)
    sizes = sorted({max(1, round(share * a.kv_groups)) for share in SHARES})
    path = directory / "attention.onnx"
    sides = {n: _sample(setting, part, setting.open(stacks.attention(path, layer, n, copies, setting.dtype))) for n in sizes}
    times = _medians(sides, seconds, copies)
    return Curve(sizes=sizes, nanoseconds=[times[n] for n in sizes])


def _matrix(setting: Setting, part: PartName, linear: Linear, copies: int, directory: Path, seconds: float) -> Matrix:
    copies = _copies(setting, copies, linear.d_in * linear.d_out)
    even = linear.d_in * linear.d_out / (linear.d_in + linear.d_out)
    ranks = sorted({max(1, round(share * even / RANK_MULTIPLE) * RANK_MULTIPLE) for share in SHARES})
    path = directory / "matrix.onnx"
    sides = {r: _sample(setting, part, setting.open(stacks.matrix(path, linear, r, copies, setting.dtype))) for r in (None, *ranks)}
    times = _medians(sides, seconds, copies)
    return Matrix(dense=times[None], pair=Curve(sizes=ranks, nanoseconds=[times[r] for r in ranks]))


def _copies(setting: Setting, layers: int, weights: int) -> int:
    return max(1, min(layers, STACK_BYTES // (weights * setting.itemsize)))


def _medians(sides: Mapping[int | None, Sample], seconds: float, copies: int) -> dict[int | None, float]:
    """Nanoseconds of one copy, by side."""
    return {size: 1e6 * median(ms) / copies for size, ms in interleave(sides, seconds=seconds).items()}


def _sample(setting: Setting, part: PartName, engine: Engine) -> Sample:
    """One run of a graph at the token counts of a part."""
    workload, rng = setting.workload, np.random.default_rng(0)
    batch, tokens, past = {
        "vision": (workload.batch * workload.images, setting.anatomy.geometry.tokens, 0),
        "prefill": (workload.batch, workload.prompt_tokens, 0),
        "decode": (workload.batch, 1, workload.prompt_tokens + workload.new_tokens // 2),
    }[part]
    feeds = {}
    for x in engine.inputs:
        if x.name == "attention_mask":
            feeds[x.name] = np.ones((batch, past + tokens), np.int64)
        elif x.name == "position_ids":
            feeds[x.name] = np.broadcast_to(np.arange(past, past + tokens), (batch, tokens)).copy()
        else:
            shape = (batch, x.shape[1], past, x.shape[3]) if x.name.startswith(PAST) else (batch, tokens, x.shape[2])
            feeds[x.name] = rng.standard_normal(shape, np.float32).astype(x.dtype)
    return timed(partial(engine.run, feeds, ["first"]))
