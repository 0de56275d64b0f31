"""Time tables made up by a rule, for tests."""

from __future__ import annotations

from infoprune_export.models.anatomy import Anatomy
from infoprune_export.models.flops import Passes, attention_flops, count, linear_macs, passes
from infoprune_export.recipe import Workload
from infoprune_export.timetable import PARTS_OF, Conditions, Part, Savings, TimeTable, attention_key, matrix_key, shapes_of

NANOSECONDS = 1000
"""Of one FLOP: enough for budgets in whole nanoseconds to be those in whole FLOPs."""


def conditions(anatomy: Anatomy, workload: Workload, **changes: object) -> Conditions:
    facts = {"engine": "ort", "dtype": "fp32", "threads": 1, "shapes": shapes_of(anatomy), "machine": {"cpu": "abacus"}, "versions": {}}
    return Conditions(workload=workload, **{**facts, **changes})


def linear_table(anatomy: Anatomy, workload: Workload, pairs: float = 1.0) -> TimeTable:
    """Every part takes time in proportion to its FLOPs; what pairs save is multiplied."""
    whole, over, made = count(anatomy, workload).parts(), passes(anatomy, workload), {}
    whole["vision"] += whole["projector"]
    repeats = {"vision": 1, "prefill": 1, "decode": workload.new_tokens - 1}
    for tower, names in PARTS_OF.items():
        for name in names:
            n = repeats[name]
            one = Passes(over[name].tokens / n, over[name].pairs / n)
            attention, matrices = {}, {}
            for layer in anatomy.tower(tower).layers:
                groups = layer.attention.kv_groups
                each = NANOSECONDS * attention_flops(layer, layer.attention.heads_per_group, 1, one)
                attention[attention_key(layer)] = Savings(sizes=[1, groups], nanoseconds=[(groups - 1) * each, 0.0])
                for m in layer.ffn.matrices.values():
                    sizes = [1, min(m.d_in, m.d_out)]
                    saved = [pairs * NANOSECONDS * 2 * one.tokens * (linear_macs(m) - linear_macs(m, r)) for r in sizes]
                    matrices[matrix_key(m)] = Savings(sizes=sizes, nanoseconds=saved)
            made[name] = Part(passes=n, whole=NANOSECONDS * whole[name] / n, attention=attention, pairs=matrices)
    return TimeTable(conditions=conditions(anatomy, workload), parts=made)
