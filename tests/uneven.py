"""A plan that keeps something else of every layer, with factors, for the models of `networks`."""

from __future__ import annotations

import numpy as np

from infoprune_export.compress.decide import keep_everything
from infoprune_export.models.anatomy import site
from infoprune_export.plans import Source
from infoprune_export.recipe import Criterion, Workload

WORKLOAD = Workload(batch=2, images=1, image_tokens=16, text_tokens=5, new_tokens=4)


def whole_plan(anatomy):
    source = Source(id="random", sha256="0" * 64)
    return keep_everything(anatomy, source=source, criterion=Criterion(), workload=WORKLOAD, scope="all")


def uneven_plan(anatomy):
    """Different heads, groups and ranks in every layer, and some layers whole."""
    plan = whole_plan(anatomy)
    cuts = {
        ("vision", 0): ([1, 3], [1, 3], {"up": 5}),
        ("vision", 1): ([0, 1, 2], [0, 1, 2], {"down": 9}),
        ("language", 0): ([0, 2], [1, 5], {"gate": 7, "up": 3, "down": 11}),
        ("language", 1): ([1], [2, 3], {"down": 1}),
    }
    for (tower, index), (groups, heads, ranks) in cuts.items():
        decision = plan.decision(tower, index)
        decision.kv_groups, decision.heads = groups, heads
        decision.ranks = {**decision.ranks, **ranks}
    return plan


def random_factors(plan, refit=(("vision", 0), ("language", 1))):
    """Factors of the right shapes; the output projections not in `refit` are left to be sliced."""
    rng = np.random.default_rng(1)
    factors = {}

    def add(name, *shape):
        factors[name] = (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    for layer in plan.anatomy.layers():
        decision = plan.decision(layer.tower, layer.index)
        if (layer.tower, layer.index) in refit:
            key, o = site(layer.tower, layer.index, "o"), layer.attention.o
            add(f"{key}.weight", o.d_out, len(decision.heads) * layer.attention.head_dim)
            if o.bias:
                add(f"{key}.bias", o.d_out)
        for role, rank in decision.ranks.items():
            if rank is not None:
                key, linear = site(layer.tower, layer.index, role), layer.linear(role)
                add(f"{key}.first", rank, linear.d_in)
                add(f"{key}.second", linear.d_out, rank)
                if linear.bias:
                    add(f"{key}.bias", linear.d_out)
    return factors
