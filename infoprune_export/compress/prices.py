"""What a budget is counted in: FLOPs, or nanoseconds of a time table."""

from __future__ import annotations

from abc import ABC, abstractmethod

from infoprune_export.compress.allocate import Measured
from infoprune_export.models.anatomy import Anatomy, Layer, TowerName
from infoprune_export.models.flops import attention_flops, count, tower_passes
from infoprune_export.recipe import Scope, Workload
from infoprune_export.timetable import TimeTable


class Prices(ABC):
    """What the parts of one request cost; whole numbers, so that a budget is met exactly."""

    option: str
    """The command line's name of such a budget, for messages."""

    @abstractmethod
    def whole(self, scope: Scope) -> int:
        """What a budget over a scope is a fraction of."""

    @abstractmethod
    def tower(self, name: TowerName) -> int:
        """What the original spends in a tower."""

    @abstractmethod
    def unit(self, layer: Layer) -> int:
        """One KV group of a layer with its query heads."""

    @abstractmethod
    def matrix(self, layer: Layer, role: str) -> Measured | None:
        """A feed-forward matrix; None where it costs its FLOPs."""


class Flops(Prices):
    """Every part costs its FLOPs."""

    option = "--flops"

    def __init__(self, anatomy: Anatomy, workload: Workload):
        self._count, self._passes = count(anatomy, workload), tower_passes(anatomy, workload)

    def whole(self, scope: Scope) -> int:
        return self._count.over(scope)

    def tower(self, name: TowerName) -> int:
        return self._count.over(name)

    def unit(self, layer: Layer) -> int:
        return attention_flops(layer, layer.attention.heads_per_group, 1, self._passes[layer.tower])

    def matrix(self, layer: Layer, role: str) -> None:
        return None


class Nanoseconds(Prices):
    """Every part costs the time that it takes; a budget is always over the whole request, end to end.

    A table knows what is saved, which is all that an allocation compares: a matrix costs what it takes more than its smallest pair,
    and what is left of a layer then is part of what cannot be cut. A unit costs the mean of what those of its layer save.
    """

    option = "--latency"

    def __init__(self, table: TimeTable):
        self._table = table

    def whole(self, scope: Scope) -> int:
        return round(self._table.end_to_end)

    def tower(self, name: TowerName) -> int:
        return round(self._table.tower(name))

    def unit(self, layer: Layer) -> int:
        return max(1, round(self._table.saved_by_heads(layer, 1) / max(1, layer.attention.kv_groups - 1)))

    def matrix(self, layer: Layer, role: str) -> Measured:
        linear, table = layer.linear(role), self._table
        most = max(0.0, table.saved_by_pair(linear, layer.tower, 1))
        return Measured(lambda rank: round(most - table.saved_by_pair(linear, layer.tower, rank)), table.largest_rank(linear, layer.tower))
