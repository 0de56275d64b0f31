"""Decoders that update their cache in place, computed by ONNX Runtime, against the portable graphs that they come from."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from networks import build

from infoprune_export.bundle import DECODER, graph_file
from infoprune_export.engines.cache_update import update_in_place
from infoprune_export.engines.graphs import read_graph
from infoprune_export.engines.onnxruntime import OrtEngine
from infoprune_export.graph.export import export_graphs
from infoprune_export.models.families import find_anatomy

torch.set_num_threads(1)
CAPACITY, LAYERS = 24, 3
PAST, PRESENT = "past_key_values.", "present."


@pytest.fixture(scope="module")
def portable(tmp_path_factory):
    """A decoder with grouped heads, of which two layers look at the last six tokens and one at all."""
    directory = tmp_path_factory.mktemp("portable")
    model = build(language="qwen2")
    language = model.model.language_model
    language.config.sliding_window, language.has_sliding_layers = 6, True
    language.config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    export_graphs(model, find_anatomy(model), directory)
    return directory / graph_file(DECODER)


@pytest.fixture(scope="module")
def updated(portable):
    model = read_graph(portable)
    assert update_in_place(model, CAPACITY) == 2 * LAYERS
    onnx.save(model, portable.with_name("updated.onnx"))
    onnx.checker.check_model(str(portable.with_name("updated.onnx")), full_check=True)
    return portable.with_name("updated.onnx")


def feeds_of(embeds, padded):
    """Left padding of so many tokens in each row."""
    mask = np.stack([np.r_[np.zeros(n, np.int64), np.ones(embeds.shape[1] - n, np.int64)] for n in padded])
    return {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(-1) - 1, 0)}


def next_feeds(embeds, mask):
    mask = np.pad(mask, ((0, 0), (0, embeds.shape[1])), constant_values=1)
    return {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1)[:, -embeds.shape[1] :]}


@pytest.mark.parametrize(("more", "mask_tile"), [(1, 1), (3, 1), (1, 8), (3, 8)])
def test_computes_what_the_portable_graph_does(portable, updated, more, mask_tile):
    """A padded prompt, then steps of one token or of several, under masks that are as long as the tokens or longer.

    What lies in the room behind the tokens does not matter.
    """
    one, other = OrtEngine.open(portable, threads=1), OrtEngine.open(updated, threads=1)
    rng = np.random.default_rng(0)
    hidden = next(x.shape[2] for x in one.inputs if x.name == "inputs_embeds")
    embeds = lambda tokens: rng.normal(size=(2, tokens, hidden)).astype(np.float32)
    caches = [x for x in one.inputs if x.name.startswith(PAST)]
    past = {x.name: np.zeros((2, x.shape[1], 0, x.shape[3]), np.float32) for x in caches}
    room = {x.name: np.full((2, x.shape[1], CAPACITY, x.shape[3]), 1e6, np.float32) for x in caches}
    feeds = feeds_of(embeds(9), (0, 4))
    for _ in range(4):
        mask = feeds["attention_mask"]
        longer = {"attention_mask": np.pad(mask, ((0, 0), (0, -mask.shape[1] % mask_tile)))}
        expected, found = one.run({**feeds, **past}), other.run({**feeds, **longer, **room})
        np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-5)
        past = {x.name: expected[x.name.replace(PAST, PRESENT)] for x in caches}
        room = {x.name: found[x.name.replace(PAST, PRESENT)] for x in caches}
        tokens = feeds["attention_mask"].shape[1]
        for name, kept in past.items():
            np.testing.assert_allclose(room[name][:, :, :tokens], kept, atol=1e-6)
            assert (room[name][:, :, tokens:] == 1e6).all()
        feeds = next_feeds(embeds(more), feeds["attention_mask"])


def test_a_mask_of_nothing_writes_nowhere_else(updated):
    """TensorRT times kernels on inputs that nobody has filled."""
    engine = OrtEngine.open(updated, threads=1)
    empty = {x.name: np.zeros([2 if isinstance(d, str) else d for d in x.shape], x.dtype) for x in engine.inputs}
    for tokens in (0, CAPACITY):
        mask = np.zeros((2, CAPACITY), np.int64)
        mask[:, tokens:] = 1
        found = engine.run({**empty, "attention_mask": mask})
        assert all(np.isfinite(x).all() for x in found.values())


def test_each_cache_has_its_capacity_and_is_copied_nowhere(updated):
    graph = onnx.load(updated, load_external_data=False).graph
    operators = [n.op_type for n in graph.node]
    assert operators.count("TensorScatter") == 2 * LAYERS
    for value in (*graph.input, *graph.output):
        if value.name.startswith((PAST, PRESENT)):
            assert value.type.tensor_type.shape.dim[2].dim_value == CAPACITY
            (node,) = (n for n in graph.node if value.name in (n.input if value.name.startswith(PAST) else n.output))
            assert node.op_type == "TensorScatter"


def test_graphs_without_such_a_cache_stay_as_they_are(portable):
    vision = read_graph(portable.with_name("vision_encoder.onnx"))
    decoder = read_graph(portable)
    shape_reader = onnx.helper.make_node("Shape", [f"{PAST}0.key"], ["seen"])
    decoder.graph.node.append(shape_reader)  # a cache that is read otherwise, too
    mask = read_graph(portable)
    shape = next(n for n in mask.graph.node if n.op_type == "Shape" and n.input[0] == "attention_mask")
    length = next(n for n in mask.graph.node if n.op_type == "Squeeze" and n.input[0] == shape.output[0])
    mask.graph.node.append(onnx.helper.make_node("Neg", length.output, ["other"]))  # the mask's length is used otherwise, too
    old = read_graph(portable)
    old.opset_import[0].version = 22
    for model in (vision, decoder, mask, old):
        before = model.SerializeToString()
        assert update_in_place(model, CAPACITY) == 0
        assert model.SerializeToString() == before
