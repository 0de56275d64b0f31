"""Networks that stand in for a model to be timed: its shapes, or those of a plan, without its weights.

They run in the same `Session` as a bundle does, so that everything that a request takes is in their time: embedding, projector,
norms, head, the runtime's own work.
"""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

from infoprune_export.bundle import DECODER, EMBED, VISION
from infoprune_export.engines import stacks
from infoprune_export.engines.base import Engine
from infoprune_export.engines.machine import machine_report
from infoprune_export.engines.onnxruntime import OrtEngine
from infoprune_export.engines.stacks import Block
from infoprune_export.memory import memory
from infoprune_export.models.anatomy import ATTENTION_ROLES, Anatomy, Layer
from infoprune_export.plans import Plan
from infoprune_export.recipe import Dtype, Workload
from infoprune_export.runtime.config import ModelConfig
from infoprune_export.runtime.session import Session
from infoprune_export.timetable import PARTS_OF, Conditions, PartName, TimeTable, shapes_of
from infoprune_export.validation.latency import Sample, interleave, part_samples, random_inputs

ENGINE = "ort"
Name = TypeVar("Name", bound=Hashable)

Towers = Sequence[Sequence[Layer]]
"""Layers of the vision tower and of the language model."""


@dataclass(frozen=True)
class Setting:
    """What times are measured for.

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
        """Bytes of a weight."""
        return 4 if self.dtype == "fp32" else 2


class Original:
    """The original's stand-in, open for as long as parts of it are timed.

    Of towers too large for the memory one and some more layers are run, and what the others would take is added.

    Attributes:
        reference: Part to a run of it. What is timed in turn with it can be put in relation to it, whatever the machine did meanwhile.
    """

    def __init__(self, setting: Setting):
        self._setting, self._towers = setting, fitting(setting)
        self._full = [setting.anatomy.tower(t).layers for t in PARTS_OF]
        whole = _depth(self._towers) == _depth(self._full)
        self._depths = [self._towers] if whole else [self._towers, [layers[:1] for layers in self._full]]
        blocks = {_depth(t): [[stacks.whole(x) for x in layers] for layers in t] for t in self._depths}
        self._samples = _samples(setting, blocks)
        self.reference = self._samples[_depth(self._depths[-1])]

    def times(self, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
        """Nanoseconds of every part, each timed for so many seconds: of the original, and of the reference."""
        times = _times(self._samples, seconds)
        found, reference = dict(times[_depth(self._towers)]), times[_depth(self._depths[-1])]
        if len(self._depths) > 1:
            for part in found:
                tower = int(part != "vision")
                if more := len(self._towers[tower]) - 1:
                    layer = max(0.0, (found[part] - reference[part]) / more)
                    found[part] += (len(self._full[tower]) - len(self._towers[tower])) * layer
        return found, reference


def share_that_arrives(setting: Setting, table: TimeTable, plan: Plan, seconds: float) -> float:
    """Of the time that a plan saves by a table, the share that is saved end to end, on as many layers as fit; 1 where it saves none."""
    towers = fitting(setting)
    layers = [x for tower in towers for x in tower]
    blocks = {name: [[_block(x, p) for x in tower] for tower in towers] for name, p in (("original", None), ("plan", plan))}
    times = _times(_samples(setting, blocks), seconds)
    before, after = (sum(n * times[name][part] for part, n in setting.passes.items()) for name in ("original", "plan"))
    whole = len(layers) == len(plan.layers)
    saved = table.saved(plan, layers) / (table.end_to_end if whole else before)
    return (1 - after / before) / saved if saved > 0 else 1.0


def fitting(setting: Setting) -> Towers:
    """Layers, evenly spaced, of which two networks fit into memory with room to spare; all where they do."""
    # Two networks, and each graph's weights twice while ONNX Runtime loads it; half of the memory is left alone.
    room = memory().available / (2 * 2 * 2 * setting.itemsize)
    room -= 2 * setting.anatomy.vocab_size * setting.anatomy.language.hidden
    towers = []
    for layers in (setting.anatomy.vision.layers, setting.anatomy.language.layers):
        each = max(sum(x.linear(r).d_in * x.linear(r).d_out for r in (*ATTENTION_ROLES, *x.ffn.matrices)) for x in layers)
        n = min(len(layers), max(2, int(room / 2 / each)))
        towers.append([layers[i * len(layers) // n] for i in range(n)])
    return towers


def _depth(towers: Towers) -> tuple[int, ...]:
    return tuple(map(len, towers))


def _block(layer: Layer, plan: Plan | None) -> Block:
    if plan is None:
        return stacks.whole(layer)
    decision = plan.decision(layer.tower, layer.index)
    return Block(layer, len(decision.kv_groups), decision.ranks)


def _samples(setting: Setting, networks: Mapping[Name, Sequence[Sequence[Block]]]) -> dict[Name, dict[str, Sample]]:
    """Network to part to a run of it."""
    config = ModelConfig(setting.anatomy.vocab_size - 1, (), None)
    inputs = random_inputs(setting.anatomy, setting.workload, config.image_token_id)
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, towers in networks.items():
            session = Session(_components(setting, towers, Path(directory)), config)
            samples = part_samples(session, inputs, setting.workload.new_tokens)
            found[name] = {part: samples[part] for part in setting.passes}
    return found


def _times(networks: Mapping[Name, Mapping[str, Sample]], seconds: float) -> dict[Name, dict[str, float]]:
    """Network to part to its median nanoseconds, all in turn, each for so many seconds on average."""
    sides = {(name, part): sample for name, parts in networks.items() for part, sample in parts.items()}
    medians = {side: 1e6 * median(ms) for side, ms in interleave(sides, seconds=seconds * len(sides)).items()}
    return {name: {part: medians[name, part] for part in parts} for name, parts in networks.items()}


def _components(setting: Setting, towers: Sequence[Sequence[Block]], directory: Path) -> dict[str, Engine]:
    """The three graphs of a network, for a session."""
    anatomy, dtype = setting.anatomy, setting.dtype
    made = {
        VISION: stacks.vision(directory / "vision.onnx", anatomy, towers[0], dtype),
        EMBED: stacks.embedding(directory / "embedding.onnx", anatomy, dtype),
        DECODER: stacks.decoder(directory / "decoder.onnx", anatomy, towers[1], dtype),
    }
    return {component: setting.open(path) for component, path in made.items()}
