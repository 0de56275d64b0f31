"""A model's time table, measured on this machine: `bench --profile-layers`, and what `--latency` allocates by.

Every distinct attention block is timed against its kept groups, every distinct feed-forward matrix dense and as a pair, at the token
counts of the workload; sizes of one shape take turns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
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
from infoprune_export.validation.stand_ins import Original, Setting

SHARES = (0.05, 0.25, 0.5, 0.75, 1.0)
"""Of an attention block's groups, and of the rank at which a pair has the FLOPs of its dense matrix."""
RANK_MULTIPLE = 8
STACK_BYTES = 2**28
"""Weights of the copies of a part that are timed together: enough to be read from memory as in a network."""
REFERENCE = "reference"

Times = dict[int | None, float]
"""Kept groups, or rank (None: dense), to time."""
Progress = Callable[[str, int, int], None]


def measure_table(setting: Setting, seconds: float = 3.0, progress: Progress = lambda what, done, total: None) -> TimeTable:
    """Measures everything.

    Args:
        setting: Model, workload, type and threads.
        seconds: For each shape in each part, and for each part of the whole; no less than three rounds.
        progress: Told how many shapes are done, and of how many.
    """
    shapes = {name: _shapes(setting.anatomy.tower(tower).layers) for tower, names in PARTS_OF.items() for name in names}
    shapes = {name: own for name, own in shapes.items() if name in setting.passes}
    total, done = sum(map(len, shapes.values())) + 1, 0
    original = Original(setting)
    relative: dict[PartName, dict[str, Times]] = {name: {} for name in shapes}
    with tempfile.TemporaryDirectory() as directory:
        for name, own in shapes.items():
            for key, (shape, layers) in own.items():
                progress("timing layers", done, total)
                relative[name][key] = _relative(setting, name, shape, layers, original.reference[name], Path(directory), seconds)
                done += 1
    progress("timing layers", done, total)
    whole, reference = original.times(seconds)
    parts = {}
    for name, n in setting.passes.items():
        times = {key: {size: x * reference[name] for size, x in own.items()} for key, own in relative[name].items()}
        parts[name] = Part(
            passes=n,
            whole=whole[name],
            attention={key: _curve(own) for key, own in times.items() if None not in own},
            matrices={key: Matrix(dense=own.pop(None), pair=_curve(own)) for key, own in times.items() if None in own},
        )
    progress("timing layers", total, total)
    return TimeTable(conditions=setting.conditions(), parts=parts)


def _curve(times: Times) -> Curve:
    return Curve(sizes=list(times), nanoseconds=list(times.values()))


def _shapes(layers: Sequence[Layer]) -> dict[str, tuple[Layer | Linear, int]]:
    """Key of every distinct shape to one that has it, and how many have."""
    found: dict[str, tuple[Layer | Linear, int]] = {}
    for layer in layers:
        for key, thing in ((attention_key(layer), layer), *((matrix_key(m), m) for m in layer.ffn.matrices.values())):
            found[key] = (thing, found.get(key, (thing, 0))[1] + 1)
    return found


def _relative(
    setting: Setting, part: PartName, shape: Layer | Linear, layers: int, reference: Sample, directory: Path, seconds: float
) -> Times:
    """Times of one layer's part of some shape by size, in relation to the reference that takes turns with them."""
    path = directory / "graph.onnx"
    if isinstance(shape, Layer):
        a = shape.attention
        copies = _copies(setting, layers, 4 * a.q.d_in * a.heads * a.head_dim)
        sizes = sorted({max(1, round(share * a.kv_groups)) for share in SHARES})
        write = stacks.attention
    else:
        copies = _copies(setting, layers, shape.d_in * shape.d_out)
        even = shape.d_in * shape.d_out / (shape.d_in + shape.d_out)
        sizes = [None, *sorted({max(1, round(share * even / RANK_MULTIPLE) * RANK_MULTIPLE) for share in SHARES})]
        write = stacks.matrix
    sides = {size: _sample(setting, part, setting.open(write(path, shape, size, copies, setting.dtype))) for size in sizes}
    times = {side: median(ms) for side, ms in interleave({**sides, REFERENCE: reference}, seconds=seconds, warmup_rounds=1).items()}
    return {size: times[size] / times[REFERENCE] / copies for size in sizes}


def _copies(setting: Setting, layers: int, weights: int) -> int:
    return max(1, min(layers, STACK_BYTES // (weights * setting.itemsize)))


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
