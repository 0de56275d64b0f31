"""What the parts of a network take on one machine: a table of measured times, and the price of a plan by it.

A table is plain data. `validation.profile` measures one with ONNX Runtime; anything that can time a graph could fill one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Literal

import numpy as np

from infoprune_export.models.anatomy import Anatomy, Layer, Linear, TowerName
from infoprune_export.plans import Plan
from infoprune_export.recipe import Dtype, Workload
from infoprune_export.schema import Strict

PartName = Literal["vision", "prefill", "decode"]
PARTS_OF: dict[TowerName, tuple[PartName, ...]] = {"vision": ("vision",), "language": ("prefill", "decode")}


class Savings(Strict):
    """Nanoseconds that a pass saves by each layer where something is kept at a size.

    Straight lines join what was measured, once neighbours that contradict that more size never saves more share their mean.

    Attributes:
        sizes: Measured, ascending: KV groups of an attention block, or the rank of a pair.
        nanoseconds: Saved against the original.
    """

    sizes: list[int]
    nanoseconds: list[float]

    def __call__(self, size: int) -> float:
        return float(np.interp(size, self.sizes, self._falling))

    @cached_property
    def _falling(self) -> list[float]:
        pooled: list[tuple[float, int]] = []  # isotonic regression: means of neighbours, and of how many
        for ns in self.nanoseconds:
            mean, n = ns, 1
            while pooled and pooled[-1][0] < mean:
                before, m = pooled.pop()
                mean, n = (mean * n + before * m) / (n + m), n + m
            pooled.append((mean, n))
        return [mean for mean, n in pooled for _ in range(n)]


class Part(Strict):
    """One pass of a part: all images of a request, its whole prompt, or one further token.

    Attributes:
        passes: How often a request has it.
        whole: Nanoseconds of the original's part.
        attention: Shape of an attention block (see `attention_key`) to what fewer KV groups save.
        pairs: Shape of a feed-forward matrix (see `matrix_key`) to what a pair in its place saves; below 0 where it costs more.
    """

    passes: int
    whole: float
    attention: dict[str, Savings]
    pairs: dict[str, Savings]


class Conditions(Strict):
    """What the times depend on; a table serves only where all of it is the same.

    Attributes:
        shapes: Hash of the model's sizes.
        machine: Processor, cores and GPUs.
        versions: Package to version, of what ran.
    """

    schema_version: Literal[1] = 1
    engine: str
    dtype: Dtype
    threads: int
    workload: Workload
    shapes: str
    machine: dict[str, str]
    versions: dict[str, str]

    def differences(self, other: Conditions) -> list[str]:
        """What is not the same, as `name: of this one, of the other`."""
        mine, its = ({f"{k} {n}" if n else k: x for k, n, x in _flat(c.model_dump())} for c in (self, other))
        return [f"{k}: {mine.get(k, 'none')}, now {its.get(k, 'none')}" for k in sorted({*mine, *its}) if mine.get(k) != its.get(k)]


class TimeTable(Strict):
    """Times of a model's parts under some conditions.

    Attributes:
        parts: Of one request.
    """

    conditions: Conditions
    parts: dict[PartName, Part]

    @property
    def end_to_end(self) -> float:
        """Nanoseconds of the original's whole request."""
        return sum(p.passes * p.whole for p in self.parts.values())

    def saved_by_heads(self, layer: Layer, groups: int) -> float:
        """Nanoseconds of a request that a layer saves where so many KV groups stay."""
        if groups == layer.attention.kv_groups:
            return 0.0
        return sum(p.passes * p.attention[attention_key(layer)](groups) for p in self._parts(layer.tower))

    def saved_by_pair(self, linear: Linear, tower: TowerName, rank: int | None) -> float:
        """Nanoseconds of a request that a matrix saves as a pair; none where it stays dense (None)."""
        if rank is None:
            return 0.0
        return sum(p.passes * p.pairs[matrix_key(linear)](rank) for p in self._parts(tower))

    def largest_rank(self, linear: Linear, tower: TowerName) -> int:
        """The largest rank that was measured."""
        return min((p.pairs[matrix_key(linear)].sizes[-1] for p in self._parts(tower)), default=0)

    def tower(self, tower: TowerName) -> float:
        """Nanoseconds that the original's request spends in a tower, with what belongs to it."""
        return sum(p.passes * p.whole for p in self._parts(tower))

    def saved(self, plan: Plan, layers: Iterable[Layer] | None = None) -> float:
        """Nanoseconds of a request that a plan saves, in some layers or in all (None)."""
        total = 0.0
        for layer in plan.anatomy.layers() if layers is None else layers:
            decision = plan.decision(layer.tower, layer.index)
            total += self.saved_by_heads(layer, len(decision.kv_groups))
            total += sum(self.saved_by_pair(m, layer.tower, decision.ranks[role]) for role, m in layer.ffn.matrices.items())
        return total

    def kept(self, plan: Plan) -> float:
        """Fraction of the original's end-to-end time that a plan keeps, by this table."""
        return 1 - self.saved(plan) / self.end_to_end

    def _parts(self, tower: TowerName) -> list[Part]:
        return [self.parts[name] for name in PARTS_OF[tower] if name in self.parts]


def attention_key(layer: Layer) -> str:
    """The shape of an attention block, `32/8x128 on 4096` for 32 heads in 8 groups; layers that share it are measured once."""
    a = layer.attention
    bias = "+b" * a.q.bias
    return f"{a.heads}/{a.kv_groups}x{a.head_dim} on {a.q.d_in}{bias}"


def matrix_key(linear: Linear) -> str:
    """The shape of a matrix, inputs first; `+b` with a bias."""
    return f"{linear.d_in}x{linear.d_out}{'+b' * linear.bias}"


def shapes_of(anatomy: Anatomy) -> str:
    """Hash of a model's sizes; names and places of modules are not in it."""
    import hashlib

    towers = [[(attention_key(x), *map(matrix_key, x.ffn.matrices.values())) for x in anatomy.tower(t).layers] for t in PARTS_OF]
    sizes = [towers, anatomy.geometry.model_dump_json(), [matrix_key(x) for x in anatomy.projector], anatomy.vocab_size]
    return hashlib.sha256(repr(sizes).encode()).hexdigest()


def _flat(record: dict[str, object]) -> Iterator[tuple[str, str, object]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from ((key, name, x) for name, x in value.items())
        else:
            yield key, "", value
