"""Decoders whose attentions work on their cache in place, against the portable graphs that they come from."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from networks import build
from onnx import TensorProto

from infoprune_export.bundle import COMPONENTS, DECODER, graph_file
from infoprune_export.compress.decide import keep_everything
from infoprune_export.compress.surgery import shape_as_planned
from infoprune_export.engines import onnxruntime as ort
from infoprune_export.engines import stacks
from infoprune_export.engines.cache_buffers import OrtCacheBuffers
from infoprune_export.engines.cache_fusion import CAPACITY, share_cache
from infoprune_export.engines.graphs import read_graph
from infoprune_export.engines.quantise import quantise_graphs
from infoprune_export.errors import InputError
from infoprune_export.graph.export import export_graphs
from infoprune_export.models.families import find_anatomy
from infoprune_export.plans import Source
from infoprune_export.recipe import Criterion, Workload
from infoprune_export.runtime import session as runtime_session
from infoprune_export.runtime.config import ModelConfig
from infoprune_export.runtime.session import GROWTH, Session

torch.set_num_threads(1)
PROMPTS = [np.arange(3, 15), np.arange(40, 45), np.arange(60, 69)]
"""Three lengths, so that a batch is padded."""


def uneven(language: str = "llama", **text):
    """A model of three layers with 3, 1 and 2 KV groups and pairs in two of them, and the anatomy of its original."""
    model = build(language=language)
    for name, value in text.items():
        setattr(model.model.language_model.config, name, value)
    anatomy = find_anatomy(model)
    source = Source(id="random", sha256="0" * 64)
    workload = Workload(image_tokens=16, text_tokens=5, new_tokens=4)
    plan = keep_everything(anatomy, source=source, criterion=Criterion(), workload=workload, scope="all")
    for layer, groups in ((1, [1]), (2, [0, 2])):
        decision, width = plan.decision("language", layer), anatomy.language.layers[layer].attention.heads_per_group
        decision.kv_groups, decision.heads = groups, [g * width + i for g in groups for i in range(width)]
        decision.ranks = dict.fromkeys(decision.ranks, 4 + layer)
    shape_as_planned(model, plan)
    return model, anatomy


def session(directory, dtype: str = "fp32", positions: int | None = 64) -> Session:
    engines = {c: ort.OrtEngine.open(directory / graph_file(c, dtype), threads=1) for c in COMPONENTS}
    return Session(engines, ModelConfig(None, (), positions))


def engines_of(network, directory, dtype: str = "fp32"):
    """Portable graphs of a model, and the engines built from them."""
    export_graphs(*network, directory / "onnx", dtype)
    for component in COMPONENTS:
        ort.build(directory / "onnx" / graph_file(component, dtype), directory / "ort" / graph_file(component, dtype))
    return directory / "onnx", directory / "ort"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return engines_of(uneven(), tmp_path_factory.mktemp("uneven"))


def tokens(of: Session, prompts, new: int = 12, **options) -> list[list[int]]:
    return np.stack(list(of.generate(prompts, None, new, eos_ids=(), **options))).tolist()


def decoder_nodes(directory) -> list[str]:
    return [node.op_type for node in read_graph(directory / graph_file(DECODER)).graph.node]


def test_every_layer_is_fused_however_uneven(made):
    portable, built = made
    assert decoder_nodes(portable).count("Attention") == 3
    nodes = read_graph(built / graph_file(DECODER)).graph.node
    fused = [n for n in nodes if n.op_type == "GroupQueryAttention"]
    attributes = [{a.name: a.i for a in n.attribute} for n in fused]
    assert [(a["num_heads"], a["kv_num_heads"]) for a in attributes] == [(6, 3), (2, 1), (4, 2)]
    left = {n.op_type for n in nodes}
    assert not left & {"Attention", "Concat", "Transpose", "Reshape"}  # heads are split and joined inside the node


def test_tokens_are_those_of_the_portable_graph_alone_and_padded(made):
    portable, built = (session(d) for d in made)
    for prompts in ([PROMPTS[0]], [PROMPTS[1]], PROMPTS):
        assert tokens(built, prompts) == tokens(portable, prompts)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("qwen2", {}),
        pytest.param("gemma", {}, marks=pytest.mark.slow),
        pytest.param("mistral", {"sliding_window": 4}, marks=pytest.mark.slow),
    ],
)
def test_families(language, text, tmp_path):
    """Biases, heads of another width than hidden / heads, and a window."""
    portable, built = engines_of(uneven(language, **text), tmp_path)
    assert decoder_nodes(built).count("GroupQueryAttention") == 3
    assert tokens(session(built), PROMPTS) == tokens(session(portable), PROMPTS)


def test_logits_in_half_precision(tmp_path):
    anatomy = find_anatomy(build())
    blocks = [stacks.whole(layer) for layer in anatomy.language.layers]
    rng = np.random.default_rng(0)
    feeds = {"attention_mask": np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]), "position_ids": np.array([[2], [4]])}
    logits = []
    for shared in (False, True):
        engine = ort.OrtEngine.open(stacks.decoder(tmp_path / f"{shared}.onnx", anatomy, blocks, "fp16", shared), threads=1)
        assert (engine.open_cache(2, 8) is not None) == shared
        for x in engine.inputs:
            if x.name not in feeds:
                feeds[x.name] = rng.standard_normal([{"batch": 2, "sequence": 1, "past": 4}.get(n, n) for n in x.shape]).astype(x.dtype)
        logits.append(engine.run(feeds)["logits"])
    np.testing.assert_allclose(logits[1], logits[0], atol=0.01 * np.abs(logits[0]).max())


def test_steps_write_into_the_memory_that_the_prompt_was_given(made):
    built = session(made[1])
    _, cache = built.prefill(built.embed(PROMPTS[1][None]), np.ones((1, 5), np.int64), capacity=8)
    keys = cache.past._arrays["past_key_values.0.key"]
    before = keys.copy()
    assert keys.shape == (1, 3, 8, 8) and np.abs(before[:, :, :5]).min() > 0 and not before[:, :, 5:].any()
    _, longer = built.step(np.array([9]), cache)
    assert longer.past is cache.past
    np.testing.assert_array_equal(keys[:, :, :5], before[:, :, :5])
    assert np.abs(keys[:, :, 5]).min() > 0 and not keys[:, :, 6:].any()


def test_a_capacity_that_is_too_small_is_refused(made):
    built = session(made[1])
    with pytest.raises(InputError, match=r"12 tokens and 5 new ones do not fit into a cache for 16\ngive a capacity of 17, or none"):
        next(built.generate([PROMPTS[0]], None, 5, capacity=16))
    assert tokens(built, [PROMPTS[0]], 5, capacity=17) == tokens(built, [PROMPTS[0]], 5)
    with pytest.raises(InputError, match="room for 4 tokens, prompt and answer have 5"):
        built.prefill(built.embed(PROMPTS[1][None]), np.ones((1, 5), np.int64), capacity=4)
    _, cache = built.prefill(built.embed(PROMPTS[1][None]), np.ones((1, 5), np.int64), capacity=6)
    _, cache = built.step(np.array([9]), cache)
    with pytest.raises(InputError, match="room for 6 tokens, prompt and answer have 7"):
        built.step(np.array([9]), cache)


def test_without_a_capacity_room_is_made(made):
    endless = session(made[1], positions=None)
    new = GROWTH + 3
    assert tokens(endless, PROMPTS, new) == tokens(session(made[0], positions=None), PROMPTS, new)


def test_an_engine_whose_room_is_its_own_says_when_it_is_full(made, monkeypatch):
    monkeypatch.setattr(OrtCacheBuffers, "_copy", lambda buffers, tokens, capacity: None)
    monkeypatch.setattr(runtime_session, "GROWTH", 2)
    built = session(made[1], positions=None)
    longest = max(map(len, PROMPTS))
    assert len(tokens(built, PROMPTS, 3)) == 3
    with pytest.raises(InputError, match=f"room for {longest + 2} tokens, prompt and answer have {longest + 3}"):
        tokens(built, PROMPTS, 4)


def test_a_cache_can_be_continued_twice_but_not_behind_anothers_back(made):
    built = session(made[1])
    _, start = built.prefill(built.embed(PROMPTS[1][None]), np.ones((1, 5), np.int64))
    first, one = built.step(np.array([9]), start)
    _, other = built.step(np.array([11]), start)
    built.step(np.array([12]), other)
    with pytest.raises(InputError, match="another continuation of the same prompt has overwritten this cache"):
        built.step(np.array([12]), one)
    np.testing.assert_array_equal(built.step(np.array([9]), start)[0], first)


def test_an_engine_takes_a_past_of_its_exact_length_too(made):
    rng = np.random.default_rng(0)
    feeds = {"inputs_embeds": rng.standard_normal((1, 3, 48), np.float32), "attention_mask": np.ones((1, 7), np.int64)}
    feeds["position_ids"] = np.arange(4, 7)[None]
    portable, built = (session(d).engines[DECODER] for d in made)
    assert all(x.shape[2] == CAPACITY for x in built.inputs[3:])
    for x in built.inputs[3:]:
        feeds[x.name] = rng.standard_normal((1, x.shape[1], 4, x.shape[3]), np.float32)
    expected, results = portable.run(feeds), built.run(feeds)
    for name, value in expected.items():
        np.testing.assert_allclose(results[name], value, atol=1e-5)


def test_quantised_matrices_are_no_hindrance(made, tmp_path):
    onnx_dir = Path(shutil.copytree(made[0], tmp_path / "onnx"))
    quantise_graphs(onnx_dir, "fp32", "int4")
    built = ort.build(onnx_dir / graph_file(DECODER, "q4"), tmp_path / graph_file(DECODER, "q4"))
    nodes = [node.op_type for node in read_graph(built).graph.node]
    assert nodes.count("GroupQueryAttention") == 3 and "MatMulNBits" in nodes


def test_what_has_no_kernel_stays_as_it_is(made, tmp_path):
    model = read_graph(made[0] / graph_file(DECODER))
    for value in model.graph.input:
        if value.name.startswith("past_key_values."):
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    before = model.SerializeToString()
    assert share_cache(model) == 0 and model.SerializeToString() == before
    vision = onnx.load(made[0] / "vision_encoder.onnx", load_external_data=False)
    assert share_cache(vision) == 0


def test_one_attention_that_is_another_leaves_all_as_they_are(made):
    model = read_graph(made[0] / graph_file(DECODER))
    second = [n for n in model.graph.node if n.op_type == "Attention"][1]
    second.attribute.append(onnx.helper.make_attribute("softcap", 2.0))
    assert share_cache(model) == 0
