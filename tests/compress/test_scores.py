"""Every head score on blocks whose answer is known."""

import numpy as np
import pytest
import torch
from blocks import SITE, layer_of, module_of, statistics_of

from infoprune_export.compress.evidence import TaskGradients
from infoprune_export.compress.scores import HEAD_RULES, Evidence

RULES = list(HEAD_RULES)
DATA_AWARE = [r for r in RULES if r not in ("random", "magnitude")]


def evidence_of(layer, z, seed=0):
    """A block whose loss is `sum(gradient * output)`, so that every gradient is known in closed form."""
    model, g = module_of(layer, seed), torch.Generator().manual_seed(seed)
    a = layer.attention
    gradient = torch.randn(len(z), a.o.d_out, generator=g)
    stats = statistics_of(z, gradient)
    pulled = gradient @ model.o.weight
    moved = (z * pulled).reshape(len(z), a.kv_groups, -1).sum(2).abs().sum(0).double()
    weights = {SITE: gradient.T @ z}
    x = torch.randn(len(z), a.q.d_in, generator=g)
    for role, rows in (("q", a.heads), ("k", a.kv_groups), ("v", a.kv_groups)):
        # What reaches q, k and v through a head is as loud as the head.
        loud = z.reshape(len(z), rows, -1).abs().mean(2).repeat_interleave(a.head_dim, 1)
        weights[f"language.0.{role}"] = loud.T @ x
    stats.task = TaskGradients({SITE: moved}, weights)
    return Evidence(model, stats, seed)


def outputs(heads=4, head_dim=3, scale=(1.0, 1.0, 1.0, 1.0), seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(400, heads * head_dim, generator=g) * torch.tensor(scale).repeat_interleave(heads * head_dim // len(scale))


@pytest.mark.parametrize("rule", DATA_AWARE)
def test_a_dead_head_comes_last_and_louder_ones_first(rule):
    layer = layer_of()
    scores = HEAD_RULES[rule].score(layer, evidence_of(layer, outputs(scale=(0.0, 0.3, 1.0, 4.0))))
    assert np.argsort(scores).tolist() == [0, 1, 2, 3]
    if rule != "flap":  # whose scores are standardised
        assert scores[0] == pytest.approx(0, abs=1e-6)


def test_flap_standardises_over_the_layer():
    layer, z = layer_of(), outputs(scale=(0.0, 0.3, 1.0, 4.0))
    evidence = evidence_of(layer, z)
    per_channel = z.var(0, correction=0) * evidence.model.o.weight.square().sum(0)
    standard = (per_channel - per_channel.mean()) / per_channel.std()
    assert HEAD_RULES["flap"].score(layer, evidence) == pytest.approx(standard.reshape(4, 3).mean(1).tolist(), rel=1e-4)


def test_flap_does_not_count_what_is_constant():
    layer, z = layer_of(), outputs()
    steady = z.clone()
    steady[:, :3] += 100
    before, after = (HEAD_RULES["flap"].score(layer, evidence_of(layer, x)) for x in (z, steady))
    assert after == pytest.approx(before, abs=1e-2)
    wanda = HEAD_RULES["wanda-sp"].score(layer, evidence_of(layer, steady))
    assert np.argmax(wanda) == 0


@pytest.mark.parametrize("rule", [r for r in RULES if r != "random"])
def test_permuting_heads_permutes_scores(rule):
    layer, z = layer_of(), outputs(scale=(0.2, 0.5, 1.0, 2.0))
    evidence = evidence_of(layer, z)
    scores = HEAD_RULES[rule].score(layer, evidence)
    order = [2, 0, 3, 1]
    rows = [3 * h + i for h in order for i in range(3)]
    moved = evidence_of(layer, z)
    for role in ("q", "k", "v"):
        moved.model.get_submodule(role).weight.copy_(evidence.model.get_submodule(role).weight[rows])
    moved.model.o.weight.copy_(evidence.model.o.weight[:, rows])
    for stats, name in ((moved.stats.attention, "outer"), (moved.stats.attention, "total")):
        value = getattr(stats[SITE], name)
        setattr(stats[SITE], name, value[rows][:, rows] if value.ndim == 2 else value[rows])
    task = moved.stats.task
    task.gates[SITE] = task.gates[SITE][order]
    task.weights = {k: v[:, rows] if k == SITE else v[rows] for k, v in task.weights.items()}
    assert HEAD_RULES[rule].score(layer, moved) == pytest.approx([scores[h] for h in order], rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_group_is_one_unit_with_all_its_query_heads(rule):
    """Three groups of two heads; only the second head of the last group speaks, and its group is the one that counts."""
    layer = layer_of(heads=6, groups=3, head_dim=2)
    z = outputs(heads=6, head_dim=2, scale=(0.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    evidence = evidence_of_groups(layer, z)
    scores = HEAD_RULES[rule].score(layer, evidence)
    assert len(scores) == 3
    if rule in DATA_AWARE:
        assert np.argmax(scores) == 2
        assert scores[0] == pytest.approx(scores[1])


def evidence_of_groups(layer, z):
    a = layer.attention
    evidence = evidence_of(layer, z)
    # A group's keys and values are as loud as its loudest query head.
    loud = z.reshape(len(z), a.kv_groups, -1).abs().amax(2).repeat_interleave(a.head_dim, 1)
    for role in ("k", "v"):
        evidence.stats.task.weights[f"language.0.{role}"] = loud.T @ torch.ones(len(z), a.q.d_in)
    return evidence


def test_magnitude_is_the_norm_of_the_units_weights():
    layer = layer_of(heads=4, groups=2)
    evidence = evidence_of(layer, outputs())
    model = evidence.model
    own = [model.q.weight[:6], model.k.weight[:3], model.v.weight[:3], model.o.weight[:, :6]]
    expected = torch.cat([w.flatten() for w in own]).norm().item()
    assert HEAD_RULES["magnitude"].score(layer, evidence)[0] == pytest.approx(expected, rel=1e-6)


def test_wanda_is_the_mean_weight_times_the_norm_of_its_input():
    layer, z = layer_of(), outputs(scale=(0.2, 0.5, 1.0, 2.0))
    evidence = evidence_of(layer, z)
    per_column = evidence.model.o.weight.abs().mean(0) * z.square().sum(0).div(len(z)).sqrt()
    assert HEAD_RULES["wanda-sp"].score(layer, evidence) == pytest.approx(per_column.reshape(4, 3).sum(1).tolist(), rel=1e-5)


def test_michel_is_normalised_over_the_layer():
    layer = layer_of()
    assert np.linalg.norm(HEAD_RULES["michel"].score(layer, evidence_of(layer, outputs()))) == pytest.approx(1)


def test_random_scores_follow_the_seed_and_differ_between_layers():
    layer = layer_of()
    other = layer.model_copy(update={"index": 1})
    score = lambda x, seed: HEAD_RULES["random"].score(x, Evidence(module_of(layer), None, seed))
    assert score(layer, 3) == score(layer, 3)
    assert score(layer, 3) != score(layer, 4)
    assert score(layer, 3) != score(other, 3)


@pytest.mark.parametrize("rule", RULES)
def test_a_silent_block_has_finite_scores(rule):
    layer = layer_of()
    assert np.isfinite(HEAD_RULES[rule].score(layer, evidence_of(layer, torch.zeros(5, 12)))).all()
