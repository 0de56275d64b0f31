"""Pass 1 and pass 2 on a model whose layers have weights only in their turn, against both passes in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import batches, build

from infoprune_export.compress.decide import decide
from infoprune_export.compress.evidence import gather_for
from infoprune_export.compress.factors import layers_walked, make_factors
from infoprune_export.compress.findings import Survey, look_at_all
from infoprune_export.compress.network import load_network, open_network, save_compressed, save_weights
from infoprune_export.compress.surgery import apply_plan
from infoprune_export.errors import InputError
from infoprune_export.models.families import find_anatomy
from infoprune_export.models.load import locate
from infoprune_export.plans import Source
from infoprune_export.recipe import Criterion, Workload

WORKLOAD = Workload(image_tokens=16, text_tokens=8, new_tokens=4)
CRITERIA = {
    "ours": {},
    "one shot": {"recalibrate": False},
    "forward only": {"heads": "flap", "weighting": "activation", "recalibrate": False},
    "gates and scales": {"heads": "michel", "weighting": "asvd", "allocation": "d-rank", "recalibrate": False},
    "weights alone": {"heads": "magnitude", "weighting": "none", "allocation": "uniform"},
}


class Killed(BaseException):
    """Not an error that anything would catch."""


@pytest.fixture
def stored(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "model")
    return model, locate(str(tmp_path / "model"))


def plan_of(found, anatomy, criterion, scope="all"):
    choices = {"source": Source(id="random", sha256="0" * 64), "workload": WORKLOAD, "flops": 0.5, "scope": scope}
    return decide(found, anatomy, criterion=criterion, **choices)


def both_passes(source, criterion, directory: Path, scope="all", progress=lambda layer: None):
    """Plan and factors by way of the disk."""
    data, model = batches(), source.open_model()
    anatomy = find_anatomy(model)
    survey = Survey(directory / "pass1", criterion)
    found = survey.take(model, anatomy, data, progress=progress)
    plan = plan_of(found, anatomy, criterion, scope)
    plan.factors = make_factors(model, plan, data, survey, directory=directory / "pass2", progress=progress)
    assert all(p.is_meta for x in anatomy.layers() for p in model.get_submodule(x.path).parameters())
    return plan


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("scope", ["all", "language"])
def test_by_way_of_the_disk_plan_and_factors_are_the_same(stored, tmp_path, name, scope):
    model, source = stored
    anatomy, data, criterion = find_anatomy(model), batches(), Criterion(rank_multiple=2, **CRITERIA[name])
    stats = gather_for(criterion, model, anatomy, data)
    expected = plan_of(look_at_all(model, anatomy, stats, criterion), anatomy, criterion, scope)
    expected.factors = make_factors(model, expected, data, stats)
    plan = both_passes(source, criterion, tmp_path, scope)
    assert plan.to_json() == expected.to_json() and plan.factors.keys() == expected.factors.keys()
    assert all(np.array_equal(plan.factors[k], expected.factors[k]) for k in plan.factors)


@pytest.mark.parametrize("at", [0, 3, 5, 6, 8, 9])
def test_a_killed_run_comes_to_the_same(stored, tmp_path, at):
    _, source = stored
    criterion, done = Criterion(rank_multiple=2), []
    expected = both_passes(source, criterion, tmp_path / "whole")

    def dies(layer):
        if len(done) == at:
            raise Killed
        done.append(layer)

    with pytest.raises(Killed):
        both_passes(source, criterion, tmp_path / "killed", progress=dies)
    plan = both_passes(source, criterion, tmp_path / "killed")
    assert plan.to_json() == expected.to_json(), "the hash of the factors is part of the plan"


def test_findings_of_a_layer_are_not_made_twice(stored, tmp_path, monkeypatch):
    _, source = stored
    criterion = Criterion(rank_multiple=2)
    both_passes(source, criterion, tmp_path)
    monkeypatch.setattr("infoprune_export.compress.findings.look", None)
    monkeypatch.setattr("infoprune_export.compress.factors._cut_layer", None)
    both_passes(source, criterion, tmp_path)


def test_the_written_network_is_what_surgery_makes_in_memory(stored, tmp_path):
    model, source = stored
    plan = both_passes(source, Criterion(rank_multiple=2), tmp_path)
    factors = {**plan.factors, "projector.0.weight": np.ones((48, 32), np.float32), "projector.0.bias": np.zeros(48, np.float32)}
    plan.save(tmp_path / "out")
    model.config.save_pretrained(tmp_path / "out")
    save_compressed(source.open_model(), plan, factors, tmp_path / "out")
    apply_plan(model, plan, factors)
    network = load_network(tmp_path / "out")
    state, expected = network.state_dict(), model.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[k], expected[k]) for k in expected)
    first = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    save_weights(network, tmp_path / "again")
    assert (tmp_path / "again" / "model" / "model.safetensors").read_bytes() == first
    network.lm_head.weight.data.zero_()
    assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == first


def test_weights_of_another_plan_are_refused(stored, tmp_path):
    model, source = stored
    plan = both_passes(source, Criterion(rank_multiple=2), tmp_path)
    plan.save(tmp_path / "out")
    model.config.save_pretrained(tmp_path / "out")
    save_weights(model, tmp_path / "out")
    with pytest.raises(InputError, match="does not fit the plan"):
        open_network(tmp_path / "out")


def test_only_layers_in_front_of_the_last_cut_are_walked(stored):
    model, _ = stored
    anatomy = find_anatomy(model)
    plan = plan_of(_level(anatomy), anatomy, Criterion(rank_multiple=2), "language")
    assert layers_walked(plan)[: len(anatomy.vision.layers)] == list(anatomy.vision.layers)
    only_vision = plan_of(_level(anatomy), anatomy, Criterion(rank_multiple=2), "vision")
    assert {x.tower for x in layers_walked(only_vision)} == {"vision"}


def _level(anatomy):
    """Findings in which nothing is worth more than anything else."""
    from infoprune_export.compress.findings import LayerFindings

    found = {}
    for layer in anatomy.layers():
        spectra = {role: np.linspace(2, 1, min(m.d_in, m.d_out)) for role, m in layer.ffn.matrices.items()}
        found[layer.tower, layer.index] = LayerFindings([1.0] * layer.attention.kv_groups, spectra, seen=True, felt=True)
    return found
