"""The plan applied to the original's graphs, against the plan applied to the PyTorch model and exported."""

import copy
import shutil

import numpy as np
import onnx
import pytest
from comparison import Graphs, Stock, assert_same_network
from networks import build
from uneven import WORKLOAD, random_factors, uneven_plan, whole_plan

from infoprune_export.bundle import COMPONENTS, DECODER, EMBED, VISION, graph_file
from infoprune_export.compress.surgery import apply_plan
from infoprune_export.errors import InputError
from infoprune_export.graph.count import count_bundle
from infoprune_export.graph.export import export_graphs
from infoprune_export.graph.rewrite import rewrite_graphs
from infoprune_export.graph.storage import SITES_KEY, load_graph, metadata
from infoprune_export.models.anatomy import site
from infoprune_export.models.flops import count
from infoprune_export.recipe import Criterion


def weights(path):
    return {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer if i.data_type == onnx.TensorProto.FLOAT}


def test_both_routes_give_the_same_network(exported, tmp_path):
    model, anatomy, directory = exported
    plan = uneven_plan(anatomy)
    factors = random_factors(plan)
    rewrite_graphs(directory, plan, factors, tmp_path / "rewritten")
    small = copy.deepcopy(model)
    apply_plan(small, plan, factors)
    export_graphs(small, anatomy, tmp_path / "exported")

    assert_same_network(Graphs(tmp_path / "rewritten"), Stock(small), atol=1e-5)
    assert_same_network(Graphs(tmp_path / "exported"), Stock(small), atol=1e-5)
    predicted = count(anatomy, WORKLOAD, plan)
    for route in ("rewritten", "exported"):
        assert count_bundle(tmp_path / route, WORKLOAD) == {**predicted.parts(), "total": predicted.total}
    for component in (VISION, EMBED, DECODER):
        left, right = (weights(tmp_path / route / graph_file(component)) for route in ("rewritten", "exported"))
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)
        rewritten, other = (load_graph(tmp_path / route / graph_file(component)) for route in ("rewritten", "exported"))
        assert metadata(rewritten, SITES_KEY, {}) == metadata(other, SITES_KEY, {})
        assert list(rewritten.graph.input) == list(other.graph.input)
        assert list(rewritten.graph.output) == list(other.graph.output)
        onnx.checker.check_model(str(tmp_path / "rewritten" / graph_file(component)), full_check=True)


def trained_factors(plan):
    """Random weights for every map that training may change."""
    rng, factors = np.random.default_rng(2), random_factors(plan, refit=[(x.tower, x.index) for x in plan.anatomy.layers()])
    for layer in plan.anatomy.layers():
        decision, width = plan.decision(layer.tower, layer.index), layer.attention.head_dim
        rows = {"q": len(decision.heads) * width, "k": len(decision.kv_groups) * width, "v": len(decision.kv_groups) * width}
        for role in ("q", "k", "v", *(r for r, rank in decision.ranks.items() if rank is None)):
            key, linear = site(layer.tower, layer.index, role), layer.linear(role)
            d_out = rows.get(role, linear.d_out)
            factors[f"{key}.weight"] = (rng.standard_normal((d_out, linear.d_in)) / np.sqrt(linear.d_in)).astype(np.float32)
            if linear.bias:
                factors[f"{key}.bias"] = rng.standard_normal(d_out).astype(np.float32)
    for i, linear in enumerate(plan.anatomy.projector):
        factors[f"projector.{i}.weight"] = (rng.standard_normal((linear.d_out, linear.d_in)) / np.sqrt(linear.d_in)).astype(np.float32)
        factors[f"projector.{i}.bias"] = rng.standard_normal(linear.d_out).astype(np.float32)
    return factors


def test_trained_weights_of_every_map_give_the_same_network_on_both_routes(exported, tmp_path):
    model, anatomy, directory = exported
    plan = uneven_plan(anatomy)
    factors = trained_factors(plan)
    assert {name.rpartition(".")[0] for name in factors} == set(plan.trained_maps())
    rewrite_graphs(directory, plan, factors, tmp_path / "rewritten")
    small = copy.deepcopy(model)
    apply_plan(small, plan, factors)
    export_graphs(small, anatomy, tmp_path / "exported")
    assert_same_network(Graphs(tmp_path / "rewritten"), Stock(small), atol=1e-5)
    for component in (VISION, DECODER):
        left, right = (weights(tmp_path / route / graph_file(component)) for route in ("rewritten", "exported"))
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_trained_weights_of_the_wrong_shape_are_refused(exported, tmp_path):
    plan = uneven_plan(exported[1])
    factors = trained_factors(plan)
    factors["projector.0.weight"] = factors["projector.0.weight"][:-1]
    with pytest.raises(InputError, match=r"projector\.0\.weight has shape \[47, 32\], the plan asks for \[48, 32\]"):
        rewrite_graphs(exported[2], plan, factors, tmp_path / "rewritten")


def test_a_bias_that_heads_leave_behind_is_added_to_the_graph(exported, tmp_path):
    model, anatomy, directory = exported
    plan = uneven_plan(anatomy)
    plan.criterion = Criterion(compensate="bias")
    pruned = [x for x in anatomy.layers() if len(plan.decision(x.tower, x.index).heads) < x.attention.heads]
    factors = random_factors(plan, refit=[(x.tower, x.index) for x in pruned])
    gained = [x for x in pruned if plan.gains_bias(x)]
    factors |= {f"{site(x.tower, x.index, 'o')}.bias": np.ones(x.attention.o.d_out, np.float32) for x in gained}
    rewrite_graphs(directory, plan, factors, tmp_path / "rewritten")
    small = copy.deepcopy(model)
    apply_plan(small, plan, factors)
    export_graphs(small, anatomy, tmp_path / "exported")
    assert gained
    for route in ("rewritten", "exported"):
        assert_same_network(Graphs(tmp_path / route), Stock(small), atol=1e-5)
    left, right = (load_graph(tmp_path / route / graph_file(DECODER)) for route in ("rewritten", "exported"))
    assert metadata(left, SITES_KEY, {}) == metadata(right, SITES_KEY, {})
    assert count_bundle(tmp_path / "rewritten", WORKLOAD) == count_bundle(tmp_path / "exported", WORKLOAD)


@pytest.mark.slow
def test_both_routes_in_half_precision(exported, tmp_path):
    model, anatomy, _ = exported
    dtype = "bf16"  # the type that numpy does not know by itself
    plan = uneven_plan(anatomy)
    factors = random_factors(plan)
    export_graphs(model, anatomy, tmp_path / "original", dtype)
    rewrite_graphs(tmp_path / "original", plan, factors, tmp_path / "rewritten", dtype)
    small = copy.deepcopy(model)
    apply_plan(small, plan, factors)
    export_graphs(small, anatomy, tmp_path / "exported", dtype)
    for component in COMPONENTS:
        left, right = (onnx.load(tmp_path / route / graph_file(component, dtype)).graph for route in ("rewritten", "exported"))
        weights = [{i.name: (i.data_type, i.raw_data) for i in g.initializer if i.name.endswith("weight")} for g in (left, right)]
        assert weights[0] == weights[1]
        assert len(weights[0]) == len([i for i in right.initializer if i.name.endswith("weight")]) > 0


def test_cache_shrinks_with_the_groups(exported, tmp_path):
    _, anatomy, directory = exported
    plan = uneven_plan(anatomy)
    rewrite_graphs(directory, plan, random_factors(plan), tmp_path)
    inputs = Graphs(tmp_path).sessions[DECODER].get_inputs()
    assert [i.shape[1] for i in inputs[3::2]] == [2, 1, 3]


def test_a_plan_that_keeps_everything_changes_nothing(exported, tmp_path):
    model, anatomy, directory = exported
    rewrite_graphs(directory, whole_plan(anatomy), {}, tmp_path)
    for component in COMPONENTS:
        left, right = weights(tmp_path / graph_file(component)), weights(directory / graph_file(component))
        assert left.keys() == right.keys()
        assert all(np.array_equal(left[n], right[n]) for n in left)
    assert_same_network(Graphs(tmp_path), Stock(model), atol=1e-5)


def test_rewriting_twice_gives_the_same_bytes(exported, tmp_path):
    _, anatomy, directory = exported
    plan = uneven_plan(anatomy)
    for name in ("a", "b"):
        rewrite_graphs(directory, plan, random_factors(plan), tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_missing_factor_is_named(exported, tmp_path):
    _, anatomy, directory = exported
    plan = uneven_plan(anatomy)
    factors = random_factors(plan)
    del factors["language.0.gate.second"]
    with pytest.raises(InputError, match=r"language\.0\.gate\.second is missing"):
        rewrite_graphs(directory, plan, factors, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_factor_of_another_rank_is_named(exported, tmp_path):
    _, anatomy, directory = exported
    plan = uneven_plan(anatomy)
    factors = random_factors(plan)
    factors["vision.0.up.first"] = factors["vision.0.up.first"][:-1]
    with pytest.raises(InputError, match=r"vision\.0\.up\.first has shape \[4, 32\], the plan asks for \[5, 32\]"):
        rewrite_graphs(directory, plan, factors, tmp_path)


def test_plan_for_another_model_is_refused(exported, tmp_path):
    from infoprune_export.models.families import find_anatomy

    _, _, directory = exported
    plan = whole_plan(find_anatomy(build(language="gemma")))
    with pytest.raises(InputError, match=r"plan, language\.0\.q: is a 48 x 48 map here, the plan's is 144 x 48"):
        rewrite_graphs(directory, plan, {}, tmp_path)


def test_graphs_of_a_compressed_network_are_refused(exported, tmp_path):
    _, anatomy, directory = exported
    plan = uneven_plan(anatomy)
    rewrite_graphs(directory, plan, random_factors(plan), tmp_path / "once")
    with pytest.raises(InputError, match=r"vision\.0"):
        rewrite_graphs(tmp_path / "once", plan, random_factors(plan), tmp_path / "twice")


def test_graphs_of_another_exporter_are_refused(exported, tmp_path):
    _, anatomy, directory = exported
    shutil.copytree(directory, tmp_path / "theirs")
    path = tmp_path / "theirs" / graph_file(VISION)
    model = load_graph(path)
    del model.metadata_props[:]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="does not say where its sites are"):
        rewrite_graphs(tmp_path / "theirs", whole_plan(anatomy), {}, tmp_path / "out")
