"""A model's time table, measured on this machine: `bench --profile-layers`, and what `--latency` allocates by.

Every distinct attention block is timed against its kept groups, every distinct feed-forward matrix dense and as a pair, at the token
counts of the workload; sizes of one shape take turns. Stacks of whole layers go through the same `Session` as a bundle does, so that
what no choice changes (embedding, projector, norms, head, the runtime's own work) is in the original's time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from infoprune_export.bundle import DECODER, EMBED, VISION
from infoprune_export.engines import stacks
from infoprune_export.engines.base import Engine
from infoprune_export.engines.machine import machine_report
from infoprune_export.engines.onnxruntime import OrtEngine
from infoprune_export.engines.stacks import Block
from infoprune_export.memory import memory
from infoprune_export.models.anatomy import Anatomy, Layer, Linear
from infoprune_export.plans import Plan
from infoprune_export.recipe import Dtype, Workload
from infoprune_export.runtime.config import ModelConfig
from infoprune_export.runtime.session import PAST, Session
from infoprune_export.timetable import PARTS_OF, Conditions, Curve, Matrix, Part, PartName, TimeTable, attention_key, matrix_key, shapes_of
from infoprune_export.validation.latency import Sample, interleave, part_samples, random_inputs, timed

SHARES = (0.05, 0.25, 0.5, 0.75, 1.0)
"""Of an attention block's groups, and of the rank at which a pair has the FLOPs of its dense matrix."""
RANK_MULTIPLE = 8
STACK_BYTES = 2**28
"""Weights of the copies of a part that are timed together: enough to be read from memory as in a network."""
ENGINE = "ort"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Setting:
    """What a table is measured for.

    Attributes:
        anatomy: Of the original.
        workload: The request.
        dtype: Of the graphs.
        threads: CPU threads; all cores when None.
    """

    anatomy: Anatomy
    workload: Workload
    dtype: Dtype = "fp32"
    threads: int | None = None

    def conditions(self) -> Conditions:
        """What a table measured now depends on."""
        machine = machine_report()
        return Conditions(
            engine=ENGINE,
            dtype=self.dtype,
            threads=self.threads or machine.cores,
            workload=self.workload,
            shapes=shapes_of(self.anatomy),
            machine={"cpu": machine.cpu, "cores": str(machine.cores), "gpus": ", ".join(g.name for g in machine.gpus)},
            versions={name: v for name, v in machine.packages.items() if name.startswith("onnxruntime")},
        )

    def open(self, path: Path) -> Engine:
        """A graph, ready to run."""
        return OrtEngine.open(path, self.threads)

    @property
    def passes(self) -> dict[PartName, int]:
        """How often a request has each part; parts that it does not have are left out."""
        found: dict[PartName, int] = {"vision": int(self.workload.images > 0), "prefill": 1, "decode": self.workload.new_tokens - 1}
        return {part: n for part, n in found.items() if n}

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "fp32" else 2


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
    whole = measure_networks(setting, {"original": None}, seconds)["original"]
    for name, part in parts.items():
        part.whole = whole[name]
    progress("timing layers", total, total)
    return TimeTable(conditions=setting.conditions(), parts=parts, end_to_end=whole["end_to_end"])


def measure_networks(setting: Setting, plans: Mapping[str, Plan | None], seconds: float) -> dict[str, dict[str, float]]:
    """Nanoseconds of every part and end to end, of networks made as plans say (None: the original), in turn.

    Towers too large for the memory are cut to their first layers, and what the others would take is added.
    """
    small, large = _depths(setting, len(plans))
    depths = [large] if large == _full(setting) else [small, large]
    with tempfile.TemporaryDirectory() as directory:
        config = ModelConfig(setting.anatomy.vocab_size - 1, (), None)
        inputs = random_inputs(setting.anatomy, setting.workload, config.image_token_id)
        samples = {}
        for name, plan in plans.items():
            for depth in depths:
                session = Session(_components(setting, plan, depth, Path(directory)), config)
                samples[name, depth] = part_samples(session, inputs, setting.workload.new_tokens)
        times = {side: {} for side in samples}
        for part in next(iter(samples.values())):
            for side, ms in interleave({side: s[part] for side, s in samples.items()}, seconds=seconds).items():
                times[side][part] = 1e6 * median(ms)
    return {name: _extrapolated(setting, [times[name, d] for d in depths], depths) for name in plans}


Depth = tuple[int, int]
"""Layers of the vision tower and of the language model."""


def _full(setting: Setting) -> Depth:
    return len(setting.anatomy.vision.layers), len(setting.anatomy.language.layers)


def _depths(setting: Setting, networks: int) -> tuple[Depth, Depth]:
    """One layer a tower, and as many as fit with room to spare: a graph's weights are in memory twice for a while."""
    room = memory().available / (4 * networks * setting.itemsize)

    def fitting(layers: Sequence[Layer]) -> int:
        each = max(sum(x.linear(role).d_in * x.linear(role).d_out for role in ("q", "k", "v", "o", *x.ffn.matrices)) for x in layers)
        return min(len(layers), max(2, int(room / 2 / each)))

    return (1, 1), (fitting(setting.anatomy.vision.layers), fitting(setting.anatomy.language.layers))


def _extrapolated(setting: Setting, times: Sequence[Mapping[str, float]], depths: Sequence[Depth]) -> dict[str, float]:
    """Times of all layers from those of one and of some."""
    deep, passes = dict(times[-1]), setting.passes
    if len(times) == 1:
        return deep
    rest = deep["end_to_end"] - sum(n * deep[part] for part, n in passes.items())
    for part in passes:
        tower = int(part != "vision")
        shallow, some, every = depths[0][tower], depths[1][tower], _full(setting)[tower]
        if some > shallow:
            deep[part] += (every - some) * max(0.0, (deep[part] - times[0][part]) / (some - shallow))
    return deep | {"end_to_end": rest + sum(n * deep[part] for part, n in passes.items())}


def _components(setting: Setting, plan: Plan | None, depth: Depth, directory: Path) -> dict[str, Engine]:
    """A network with the shapes of a plan, for a session."""
    anatomy, dtype = setting.anatomy, setting.dtype
    towers = [[_block(x, plan) for x in anatomy.tower(t).layers[:n]] for t, n in zip(PARTS_OF, depth, strict=True)]
    made = {
        VISION: stacks.vision(directory / "vision.onnx", anatomy, towers[0], dtype),
        EMBED: stacks.embedding(directory / "embedding.onnx", anatomy, dtype),
        DECODER: stacks.decoder(directory / "decoder.onnx", anatomy, towers[1], dtype),
    }
    return {component: setting.open(path) for component, path in made.items()}


def _block(layer: Layer, plan: Plan | None) -> Block:
    if plan is None:
        return stacks.whole(layer)
    decision = plan.decision(layer.tower, layer.index)
    return Block(layer, len(decision.kv_groups), decision.ranks)


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
