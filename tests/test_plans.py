"""plan.json: written to be read and edited, and checked when it comes back."""

import json

import pytest
from networks import build

from infoprune_export.compress.decide import keep_everything
from infoprune_export.errors import InputError
from infoprune_export.models.families import find_anatomy
from infoprune_export.plans import Plan, Source, factors_sha256, read_factors
from infoprune_export.recipe import Criterion, Workload
from infoprune_export.tensors import described, write_tensors


@pytest.fixture(scope="module")
def plan():
    workload = Workload(image_tokens=16, text_tokens=5)
    return keep_everything(
        find_anatomy(build()), source=Source(id="x", sha256="0" * 64), criterion=Criterion(), workload=workload, scope="all"
    )


def test_survives_the_round_trip_and_has_a_line_per_layer(plan):
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert sum('"ranks"' in line for line in text.splitlines()) == len(plan.layers)
    assert plan.is_identity


def _edited(plan, edit):
    data = json.loads(plan.to_json())
    edit(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["layers"][0].update(layer=7), r"layers\[0\]: the model has no layer 7 in its vision tower"),
        (lambda d: d["layers"].append(d["layers"][0]), r"layers\[5\]: vision layer 0 is planned twice"),
        (lambda d: d["layers"].pop(), "language layer 2 is missing"),
        (lambda d: d["layers"][3].update(heads=[]), r"layers\[3\].heads: at least one must stay"),
        (lambda d: d["layers"][3].update(heads=[0, 9]), r"layers\[3\].heads: 9 is not between 0 and 5"),
        (lambda d: d["layers"][3].update(kv_groups=[0]), "same number of query heads in every kept KV group"),
        (lambda d: d["layers"][3].update(heads=[1, 0]), "must ascend"),
        (lambda d: d["layers"][3]["ranks"].update(gate=0), r"layers\[3\].ranks.gate: 0 is not a rank between 1 and 48"),
        (lambda d: d["layers"][3]["ranks"].update(gate=2.5), r"layers\[3\].ranks.gate"),
        (lambda d: d["layers"][3]["ranks"].pop("gate"), r"layers\[3\].ranks: expected exactly gate, up, down"),
        (lambda d: d.update(budgt=1), "budgt: unknown field"),
        (lambda d: d.update(schema_version=99), "schema_version: 99 is not 1, which this version"),
    ],
)
def test_edits_that_do_not_fit_are_named(plan, edit, message):
    with pytest.raises(InputError, match=message):
        Plan.from_json(_edited(plan, edit))


def test_uneven_but_consistent_edits_are_fine(plan):
    def edit(d):
        d["layers"][3].update(kv_groups=[0, 2], heads=[1, 4])
        d["layers"][4]["ranks"]["down"] = 7

    edited = Plan.from_json(_edited(plan, edit))
    assert edited.low_rank_sites() == {"language.2.down": 7}
    assert not edited.is_identity


def test_not_json_names_the_line():
    with pytest.raises(InputError, match="line 2: not JSON"):
        Plan.from_json('{\n"a": }')


def test_factors_are_checked_against_the_plan(tmp_path):
    import numpy as np

    factors, path = {"a": np.ones(3, np.float32)}, tmp_path / "factors.safetensors"
    write_tensors(path, described(factors), factors.items())
    good = factors_sha256(factors)
    assert read_factors(path, good)["a"].sum() == 3
    with pytest.raises(InputError, match="is not the file this plan was saved with"):
        read_factors(path, "0" * 64)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match="is not the file this plan was saved with"):
        read_factors(path, good)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        read_factors(path, good)
