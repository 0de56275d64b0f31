"""A model's time table, measured on this machine: `bench --profile-layers`, and what `--latency` allocates by.

One thing at a time is changed in all layers of a stand-in, and timed in turn with the original's: every distinct attention block
keeps fewer groups, every distinct feed-forward matrix becomes a pair of some rank. What a pass saves by it, over the layers that
share it, goes into the table: caches, threads and the runtime's own work are as in use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from infoprune_export.engines.stacks import Block, whole
from infoprune_export.models.anatomy import Layer, TowerName
from infoprune_export.timetable import PARTS_OF, Part, PartName, Savings, TimeTable, attention_key, matrix_key
from infoprune_export.validation.stand_ins import Setting, StandIns, times_in_turn

SHARES = (0.05, 0.25, 0.5, 0.75, 1.0)
"""Of an attention block's groups, and of the rank at which a pair has the FLOPs of its dense matrix."""
RANK_MULTIPLE = 8

Progress = Callable[[str, int, int], None]


def measure_table(setting: Setting, seconds: float = 5.0, progress: Progress = lambda what, done, total: None) -> TimeTable:
    """Measures everything.

    Args:
        setting: Model, workload, type and threads.
        seconds: For each shape in each part, all of its sizes together, and for each part of the whole; no less than three rounds.
        progress: Told how many sizes are done, and of how many.
    """
    stand_ins, passes = StandIns(setting), setting.passes
    towers = [(t, x) for t, x in zip(PARTS_OF, stand_ins.sample, strict=True) if passes.keys() & {*PARTS_OF[t]}]
    shapes = [shape for tower, layers in towers for shape in _shapes(tower, layers)]
    done, total = 0, sum(len(x.sizes) for x in shapes) + 1
    shares: dict[tuple[PartName, _Shape], list[float]] = {}
    original = stand_ins.open()
    for shape in shapes:
        parts = [part for part in PARTS_OF[shape.tower] if part in passes]
        for first in range(0, len(shape.sizes), stand_ins.at_once):
            progress("timing layers", done, total)
            turn = shape.sizes[first : first + stand_ins.at_once]
            networks = {None: original, **{size: stand_ins.open(partial(_changed, shape, size)) for size in turn}}
            sides = {size: {part: samples[part] for part in parts} for size, samples in networks.items()}
            times = times_in_turn(sides, seconds * len(turn) / len(shape.sizes))
            for part, size in product(parts, turn):
                # In relation to what took turns with it, so that it does not matter what the machine did meanwhile.
                shares.setdefault((part, shape), []).append((1 - times[size][part] / times[None][part]) / shape.uses)
            done += len(turn)
    progress("timing layers", done, total)
    whole, sample = stand_ins.original_times(seconds)
    found = {part: Part(passes=n, whole=whole[part], attention={}, pairs={}) for part, n in passes.items()}
    for (part, shape), saved in shares.items():
        kind, nothing = (found[part].pairs, []) if shape.groups is None else (found[part].attention, [shape.groups])
        nanoseconds = [share * sample[part] for share in saved]
        kind[shape.key] = Savings(sizes=[*shape.sizes, *nothing], nanoseconds=[*nanoseconds, *[0.0] * len(nothing)])
    progress("timing layers", total, total)
    return TimeTable(conditions=setting.conditions(), parts=found)


@dataclass(frozen=True)
class _Shape:
    """An attention block or a matrix that some layers of a tower share.

    Attributes:
        key: Its name in the table.
        sizes: To be measured: KV groups fewer than all, or ranks.
        uses: How many there are.
        groups: All KV groups of an attention block; None for a matrix.
    """

    tower: TowerName
    key: str
    sizes: tuple[int, ...]
    uses: int
    groups: int | None = None


def _shapes(tower: TowerName, layers: Sequence[Layer]) -> list[_Shape]:
    blocks, matrices = Counter(map(attention_key, layers)), Counter(matrix_key(m) for x in layers for m in x.ffn.matrices.values())
    found = {}
    for layer in layers:
        key, groups = attention_key(layer), layer.attention.kv_groups
        sizes = {max(1, round(share * groups)) for share in SHARES} - {groups}
        if sizes:
            found[key] = _Shape(tower, key, tuple(sorted(sizes)), blocks[key], groups)
        for m in layer.ffn.matrices.values():
            even = m.d_in * m.d_out / (m.d_in + m.d_out)
            ranks = {max(1, round(share * even / RANK_MULTIPLE) * RANK_MULTIPLE) for share in SHARES}
            found[matrix_key(m)] = _Shape(tower, matrix_key(m), tuple(sorted(ranks)), matrices[matrix_key(m)])
    return list(found.values())


def _changed(shape: _Shape, size: int, layer: Layer) -> Block:
    """A layer in which what has a shape is kept at a size."""
    block = whole(layer)
    if layer.tower != shape.tower:
        return block
    ranks = {role: size if matrix_key(m) == shape.key else None for role, m in layer.ffn.matrices.items()}
    return replace(block, groups=size if attention_key(layer) == shape.key else block.groups, ranks=ranks)
