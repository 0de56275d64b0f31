"""Physical removal, against the same network with the parts masked or multiplied out."""

import pytest
import torch
from networks import LANGUAGE, VISION, batches, build, inputs

from infoprune_export.compress.decide import decide, keep_everything
from infoprune_export.compress.factors import make_factors
from infoprune_export.compress.findings import look_at_all
from infoprune_export.compress.lowrank import LowRankLinear
from infoprune_export.compress.statistics import gather
from infoprune_export.compress.surgery import apply_plan, head_rows, shape_as_planned
from infoprune_export.errors import InputError
from infoprune_export.models.families import find_anatomy
from infoprune_export.plans import Source
from infoprune_export.recipe import Criterion, Workload

WORKLOAD = Workload(image_tokens=16, text_tokens=5, new_tokens=3)
SOURCE = Source(id="random", sha256="0" * 64)


def whole_plan(model):
    return keep_everything(find_anatomy(model), source=SOURCE, criterion=Criterion(), workload=WORKLOAD, scope="all")


def logits(model, x):
    return model(**x, use_cache=False).logits


@pytest.mark.parametrize("language", LANGUAGE)
@pytest.mark.parametrize("vision", VISION)
def test_removed_heads_are_the_same_as_heads_that_say_nothing(vision, language):
    model, masked = build(vision, language), build(vision, language)
    plan = whole_plan(model)
    for d in plan.layers:
        d.kv_groups = [0, 2] if d.tower == "language" else [1, 3]
        d.heads = [0, 1, 4, 5] if d.tower == "language" else [1, 3]
    for layer in plan.anatomy.layers():
        gone = [h for h in range(layer.attention.heads) if h not in plan.decision(layer.tower, layer.index).heads]
        masked.get_submodule(layer.attention.o.path).weight[:, head_rows(layer.attention, gone)] = 0
    apply_plan(model, plan, {})
    x = inputs()
    torch.testing.assert_close(logits(model, x), logits(masked, x), rtol=1e-4, atol=1e-4)
    shapes = {p.shape[0] for n, p in model.named_parameters() if n.endswith("k_proj.weight") and "language" in n}
    assert shapes == {2 * plan.anatomy.language.layers[0].attention.head_dim}


def test_generation_with_a_cache_agrees_with_the_whole_sequence_after_uneven_removal():
    model = build()
    plan = whole_plan(model)
    language = [d for d in plan.layers if d.tower == "language"]
    language[0].kv_groups, language[0].heads = [1], [2, 3]
    language[1].kv_groups, language[1].heads = [0, 2], [0, 5]
    apply_plan(model, plan, {})
    x = inputs(batch=1)
    out = model.generate(**x, max_new_tokens=6, do_sample=False, eos_token_id=None)
    ids = x["input_ids"]
    for _ in range(6):
        step = logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": x["pixel_values"]})
        ids = torch.cat([ids, step[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)


@pytest.mark.parametrize("language", LANGUAGE)
@pytest.mark.parametrize("vision", VISION)
def test_plan_and_factors_rebuild_the_network_that_pass_2_made(vision, language):
    model, rebuilt = build(vision, language), build(vision, language)
    data, anatomy = batches(), find_anatomy(model)
    stats = gather(model, anatomy, data)
    criterion = Criterion(rank_multiple=2)
    found = look_at_all(model, anatomy, stats, criterion)
    plan = decide(found, anatomy, source=SOURCE, criterion=criterion, workload=WORKLOAD, flops=0.45, scope="all")
    assert 0.43 < plan.budget.predicted <= 0.45
    factors = make_factors(model, plan, data, stats)
    apply_plan(rebuilt, plan, factors)
    x = inputs()
    assert torch.equal(logits(model, x), logits(rebuilt, x))
    assert any(isinstance(m, LowRankLinear) for m in rebuilt.modules())


def test_a_bias_that_was_added_is_in_the_factors_and_in_the_shapes(tmp_path):
    """FLAP's compensation: Llama's output projections have no bias until heads go."""
    model, rebuilt, reloaded = build(), build(), build(seed=1)
    data, anatomy = batches(), find_anatomy(model)
    criterion = Criterion(heads="flap", weighting="activation", allocation="uniform", compensate="bias", rank_multiple=2)
    stats = gather(model, anatomy, data, weighted=False)
    found = look_at_all(model, anatomy, stats, criterion)
    plan = decide(found, anatomy, source=SOURCE, criterion=criterion, workload=WORKLOAD, flops=0.5, scope="all")
    assert any(plan.gains_bias(x) for x in anatomy.language.layers)
    assert not any(plan.gains_bias(x) for x in anatomy.vision.layers)
    factors = make_factors(model, plan, data, stats)
    apply_plan(rebuilt, plan, factors)
    x = inputs()
    assert torch.equal(logits(model, x), logits(rebuilt, x))
    shape_as_planned(reloaded, plan)
    reloaded.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, x), logits(reloaded, x))


def test_scope_leaves_the_other_tower_alone():
    model = build()
    data, anatomy = batches(), find_anatomy(model)
    stats = gather(model, anatomy, data)
    common = {"source": SOURCE, "criterion": Criterion(rank_multiple=2), "workload": WORKLOAD, "flops": 0.5}
    found = look_at_all(model, anatomy, stats, common["criterion"])
    for scope in ("vision", "language"):
        plan = decide(found, anatomy, scope=scope, **common)
        cut = {d.tower for d in plan.layers if any(d.ranks.values()) or len(d.heads) < (4 if d.tower == "vision" else 6)}
        assert cut == {scope}
        assert 0.47 < plan.budget.predicted <= 0.5


def test_a_plan_for_another_model_is_refused():
    plan = whole_plan(build(language="gemma"))
    with pytest.raises(InputError, match="is not a 144 x 48 map here"):
        apply_plan(build(), plan, {})


def test_missing_factors_are_named():
    model = build()
    plan = whole_plan(model)
    plan.layers[0].ranks["up"] = 4
    with pytest.raises(InputError, match=r"vision\.0\.up\.first is missing"):
        apply_plan(model, plan, {})


def test_statistics_do_not_depend_on_how_samples_are_batched():
    model = build()
    anatomy, data = find_anatomy(model), batches()
    whole = gather(model, anatomy, data, weighted=False)
    single = []
    for b in data:
        for i in range(b.samples):
            single.append(type(b)({k: v[i : i + 1] for k, v in b.inputs.items()}, b.targets[i : i + 1]))
    apart = gather(model, anatomy, single, weighted=False)
    for key, m in whole.ffn.items():
        torch.testing.assert_close(m.second, apart.ffn[key].second, rtol=1e-4, atol=1e-5)


def test_statistics_refuse_a_network_with_nan():
    model = build()
    model.get_submodule("model.language_model.layers.1.mlp.up_proj").weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite at"):
        gather(model, find_anatomy(model), batches(), weighted=False)


def test_no_samples_is_said():
    model = build()
    with pytest.raises(InputError, match="no calibration samples"):
        gather(model, find_anatomy(model), [])
