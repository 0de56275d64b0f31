"""Pass 2: what the factors are made from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import batches, build, inputs

from infoprune_export.compress.decide import keep_everything
from infoprune_export.compress.evidence import gather_for
from infoprune_export.compress.factors import make_factors
from infoprune_export.errors import InputError
from infoprune_export.models.families import find_anatomy
from infoprune_export.plans import Factors, Source
from infoprune_export.recipe import Criterion, Workload


def factors_of(data, **choices) -> Factors:
    """Factors of a plan that takes a head out of every vision layer and halves its feed-forwards; pass 2 sees `data`."""
    criterion, network = Criterion(rank_multiple=2, **choices), build()
    anatomy = find_anatomy(network)
    stats = gather_for(criterion, network, anatomy, batches())
    source, workload = Source(id="random", sha256="0" * 64), Workload(image_tokens=16, text_tokens=5, new_tokens=3)
    plan = keep_everything(anatomy, source=source, criterion=criterion, workload=workload, scope="all")
    for decision in plan.layers:
        if decision.tower == "vision":
            decision.heads = decision.kv_groups = decision.kv_groups[1:]
            decision.ranks = dict.fromkeys(decision.ranks, 4)
    factors = make_factors(network, plan, data, stats)
    assert torch.isfinite(network(**inputs()).logits).all()
    return factors


@pytest.mark.parametrize("rule", ["loss", "activation", "asvd", "none"])
def test_one_shot_factors_need_nothing_but_pass_1(rule):
    factors = factors_of([], weighting=rule, recalibrate=False)
    assert factors.keys() == factors_of(batches(), weighting=rule).keys()
    assert all(np.isfinite(f).all() for f in factors.values())


def test_recalibration_changes_nothing_in_front_of_the_first_cut_and_everything_behind_it():
    here, before = factors_of(batches()), factors_of([], recalibrate=False)
    first = [k for k in here if k.startswith("vision.0.o")]
    assert first
    for k in here:
        assert np.allclose(here[k], before[k], rtol=1e-4, atol=1e-5) == (k in first), k


@pytest.mark.parametrize(("rule", "compensate", "at"), [("loss", "refit", "o"), ("loss", "none", "up"), ("asvd", "none", "up")])
def test_what_is_not_finite_in_the_compressed_prefix_is_refused(rule, compensate, at):
    data = batches()
    data[0].inputs["pixel_values"][0] = float("nan")
    with pytest.raises(InputError, match=rf"not finite at vision\.0\.{at}"):
        factors_of(data, weighting=rule, compensate=compensate)
