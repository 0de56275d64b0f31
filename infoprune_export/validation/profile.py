"""A model's time table, measured on this machine: `bench --profile-layers`, and what `--latency` allocates by.

One thing at a time is changed in all layers of a stand-in, and timed in turn with the original's: every distinct attention block
keeps fewer groups, every distinct feed-forward matrix becomes a pair of some rank. What a pass saves by it, over the layers that
share it, goes into the table: caches, threads and the runtime's own work are as in use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

from infoprune_export.engines.stacks import Block, whole
from infoprune_export.models.anatomy import Layer, Linear, TowerName
from infoprune_export.timetable import PARTS_OF, Part, PartName, Savings, TimeTable, attention_key, matrix_key
from infoprune_export.validation.stand_ins import Setting, StandIns, times_in_turn

SHARES = (0.05, 0.25, 0.5, 0.75, 1.0)
"""Of an attention block's groups, and of the rank at which a pair has the FLOPs of its dense matrix."""
RANK_MULTIPLE = 8

Progress = Callable[[str, int, int], None]


def measure_table(setting: Setting, seconds: float = 1.0, progress: Progress = lambda what, done, total: None) -> TimeTable:
    """Measures everything.

    Args:
        setting: Model, workload, type and threads.
        seconds: For each size in each part; no less than three rounds.
        progress: Told how many sizes are done, and of how many.
    """
    stand_ins, passes = StandIns(setting), setting.passes
    shapes = [
        (tower, key, uses, _sizes(shape))
        for tower, layers in zip(PARTS_OF, stand_ins.sample, strict=True)
        for key, (shape, uses) in _shapes(layers).items()
        if passes.keys() & {*PARTS_OF[tower]}
    ]
    done, total = 0, sum(len(sizes) for *_, sizes in shapes) + 1
    saved: dict[tuple[PartName, str], dict[int, float]] = {}
    for tower, key, uses, sizes in shapes:
        for first in range(0, len(sizes), stand_ins.at_once):
            progress("timing layers", done, total)
            turn = sizes[first : first + stand_ins.at_once]
            networks = {None: stand_ins.open(), **{size: stand_ins.open(partial(_changed, tower, key, size)) for size in turn}}
            parts = [part for part in PARTS_OF[tower] if part in passes]
            times = times_in_turn({size: {p: samples[p] for p in parts} for size, samples in networks.items()}, seconds)
            for part, size in product(parts, turn):
                # In relation to what took turns with it, so that it does not matter what the machine did meanwhile.
                saved.setdefault((part, key), {})[size] = (1 - times[size][part] / times[None][part]) / uses
            done += len(turn)
    progress("timing layers", done, total)
    whole, sample = stand_ins.original_times(5 * seconds)
    parts = {part: Part(passes=n, whole=whole[part], attention={}, pairs={}) for part, n in passes.items()}
    for (part, key), shares in saved.items():
        savings = Savings(sizes=list(shares), nanoseconds=[share * sample[part] for share in shares.values()])
        (parts[part].attention if "heads" in key else parts[part].pairs)[key] = savings
    progress("timing layers", total, total)
    return TimeTable(conditions=setting.conditions(), parts=parts)


def _shapes(layers: Sequence[Layer]) -> dict[str, tuple[Layer | Linear, int]]:
    """Key of every distinct shape to one that has it, and how many have."""
    found: dict[str, tuple[Layer | Linear, int]] = {}
    for layer in layers:
        for key, shape in ((attention_key(layer), layer), *((matrix_key(m), m) for m in layer.ffn.matrices.values())):
            found[key] = (shape, found.get(key, (shape, 0))[1] + 1)
    return found


def _sizes(shape: Layer | Linear) -> list[int]:
    """Kept groups of an attention block, all of them the last, or ranks of a matrix."""
    if isinstance(shape, Layer):
        groups = shape.attention.kv_groups
        return sorted({max(1, round(share * groups)) for share in SHARES})
    even = shape.d_in * shape.d_out / (shape.d_in + shape.d_out)
    return sorted({max(1, round(share * even / RANK_MULTIPLE) * RANK_MULTIPLE) for share in SHARES})


def _changed(tower: TowerName, key: str, size: int, layer: Layer) -> Block:
    """A layer whose attention or matrices of one shape are kept at a size."""
    block = whole(layer)
    if layer.tower != tower:
        return block
    ranks = {role: size if matrix_key(m) == key else None for role, m in layer.ffn.matrices.items()}
    return replace(block, groups=size if attention_key(layer) == key else block.groups, ranks=ranks)
