"""Networks that stand in for a model to be timed: its shapes, or those of a plan, without its weights.

They run in the same `Session` as a bundle does, so that everything that a request takes is in their time: embedding, projector,
norms, head, the runtime's own work.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
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
from infoprune_export.errors import NotEnough
from infoprune_export.memory import memory
from infoprune_export.models.anatomy import ATTENTION_ROLES, Anatomy, Layer
from infoprune_export.plans import Plan
from infoprune_export.recipe import Dtype, Workload
from infoprune_export.runtime.config import ModelConfig
from infoprune_export.runtime.session import Session
from infoprune_export.timetable import PARTS_OF, Conditions, PartName, TimeTable, attention_key, matrix_key, shapes_of
from infoprune_export.validation.latency import Sample, interleave, part_samples, random_inputs

ENGINE = "ort"
MOST_LAYERS = 12
"""Of a tower that are run; what more of them would take is added."""
SAMPLE_WEIGHTS = 2**27
"""Where the layers that are run have more weights, parts are changed in one layer of every shape alone: each run takes long enough."""

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
            versions={name: v for name, v in machine.packages.items() if name.startswith(("onnxruntime", "infoprune-export"))},
        )

    @property
    def passes(self) -> dict[PartName, int]:
        """How often a request has each part; parts that it does not have are left out."""
        found: dict[PartName, int] = {"vision": int(self.workload.images > 0), "prefill": 1, "decode": self.workload.new_tokens - 1}
        return {part: n for part, n in found.items() if n}

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return 4 if self.dtype == "fp32" else 2


class StandIns:
    """Stand-ins of one setting, opened as they are needed.

    Attributes:
        layers: Of both towers that the stand-in for the original has: all, or as many, evenly spaced, as fit into memory twice.
        sample: Of these, the layers whose parts are changed one at a time: all, or one of every shape where they are large.
        at_once: How many changed networks fit into memory beside an unchanged one.
    """

    def __init__(self, setting: Setting):
        """
        Raises:
            NotEnough: the memory does not hold a layer of each tower with embedding and head.
        """
        self.setting = setting
        self._full = [list(setting.anatomy.tower(t).layers) for t in PARTS_OF]
        # In weights: half of the memory is left alone, and ONNX Runtime holds a graph's weights twice while it loads it.
        room = memory().available / (4 * setting.itemsize)
        outside = 2 * setting.anatomy.vocab_size * setting.anatomy.language.hidden
        each = sum(max(map(_weights, layers)) for layers in self._full)
        if room < outside + each:
            needed, free = (4 * setting.itemsize * x / 1e9 for x in (outside + each, room))
            raise NotEnough(
                f"timing layers of this size needs {needed:.0f} GB of memory, {free:.0f} GB are free",
                mend="use a machine with more memory, or --flops",
            )
        n = min(MOST_LAYERS, max(2, int((room / 2 - outside) / each)))
        self.layers = [[layers[i * len(layers) // n] for i in range(n)] if n < len(layers) else layers for layers in self._full]
        self._few = [_distinct(layers) for layers in self.layers]
        self.sample = self.layers if sum(_weights(x) for layers in self.layers for x in layers) <= SAMPLE_WEIGHTS else self._few
        self.at_once = max(1, int(room / (outside + sum(_weights(x) for layers in self.sample for x in layers))) - 1)
        self._config = ModelConfig(setting.anatomy.vocab_size - 1, (), None)
        self._inputs = random_inputs(setting.anatomy, setting.workload, self._config.image_token_id)
        self._shared: dict[str, tuple[Sequence[Block], Engine]] = {}

    @property
    def complete(self) -> bool:
        """Whether the stand-in for the original has all layers."""
        return self.layers == self._full

    def open(self, change: Callable[[Layer], Block] = stacks.whole, layers: Towers | None = None) -> dict[PartName, Sample]:
        """Part to a run of it, of a network of these layers (None: `sample`), each changed.

        A component that does not differ from the one opened before is shared with it.
        """
        vision, language = ([change(x) for x in tower] for tower in (layers or self.sample))
        anatomy, dtype = self.setting.anatomy, self.setting.dtype
        engines = {
            VISION: self._engine(VISION, vision, lambda path: stacks.vision(path, anatomy, vision, dtype)),
            EMBED: self._engine(EMBED, (), lambda path: stacks.embedding(path, anatomy, dtype)),
            DECODER: self._engine(DECODER, language, lambda path: stacks.decoder(path, anatomy, language, dtype, shared=True)),
        }
        samples = part_samples(Session(engines, self._config), self._inputs, self.setting.workload.new_tokens)
        return {part: samples[part] for part in self.setting.passes}

    def original_times(self, seconds: float) -> tuple[dict[PartName, float], dict[PartName, float]]:
        """Nanoseconds of every part of the original, with what layers take that are not run, and of `sample`."""
        times = times_in_turn({"some": self.open(layers=self.layers), "few": self.open(layers=self._few)}, seconds)
        found = dict(times["some"])
        for part, ns in found.items():
            full, some, few = (len(towers[int(part != "vision")]) for towers in (self._full, self.layers, self._few))
            if full > some > few:
                found[part] = ns + (full - some) * max(0.0, ns - times["few"][part]) / (some - few)
        return found, times["some" if self.sample is self.layers else "few"]

    def _engine(self, component: str, blocks: Sequence[Block], write: Callable[[Path], Path]) -> Engine:
        kept = self._shared.get(component)
        if kept is not None and kept[0] == blocks:
            return kept[1]
        with tempfile.TemporaryDirectory() as directory:
            engine = OrtEngine.open(write(Path(directory) / f"{component}.onnx"), self.setting.threads)
        self._shared.setdefault(component, (blocks, engine))
        return engine


def times_in_turn(networks: Mapping[Name, Mapping[PartName, Sample]], seconds: float) -> dict[Name, dict[PartName, float]]:
    """Network to part to its median nanoseconds; the networks take turns, so many seconds for each part."""
    found: dict[Name, dict[PartName, float]] = {name: {} for name in networks}
    for part in next(iter(networks.values())):
        sides = {name: parts[part] for name, parts in networks.items()}
        for name, ms in interleave(sides, seconds=seconds, warmup_rounds=1).items():
            found[name][part] = 1e6 * median(ms)
    return found


def share_that_arrives(setting: Setting, table: TimeTable, plan: Plan, seconds: float) -> float:
    """Of the time that a plan saves by a table, the share that is saved when all is done together; 1 where it saves none."""
    stand_ins = StandIns(setting)

    def planned(layer: Layer) -> Block:
        decision = plan.decision(layer.tower, layer.index)
        return Block(layer, len(decision.kv_groups), decision.ranks)

    times = times_in_turn({"original": stand_ins.open(layers=stand_ins.layers), "plan": stand_ins.open(planned, stand_ins.layers)}, seconds)
    before, after = (sum(n * times[name][part] for part, n in setting.passes.items()) for name in ("original", "plan"))
    # The table's saving is put in relation to the table's own total where it can be: the machine may be slower now than it was then.
    saved = table.saved(plan, [x for tower in stand_ins.layers for x in tower]) / (table.end_to_end if stand_ins.complete else before)
    return (1 - after / before) / saved if saved > 0 else 1.0


def _distinct(layers: Sequence[Layer]) -> list[Layer]:
    """The first layer of every shape."""
    return list({(attention_key(x), *map(matrix_key, x.ffn.matrices.values())): x for x in reversed(layers)}.values())


def _weights(layer: Layer) -> int:
    return sum(layer.linear(r).d_in * layer.linear(r).d_out for r in (*ATTENTION_ROLES, *layer.ffn.matrices))
