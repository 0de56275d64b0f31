"""Stand-in graphs: the FLOPs and the ports of what they stand in for, and graphs that run."""

import numpy as np
import onnx
import pytest
from networks import build

from infoprune_export.bundle import DECODER, VISION, graph_file
from infoprune_export.engines import stacks
from infoprune_export.engines.onnxruntime import OrtEngine
from infoprune_export.engines.stacks import Block
from infoprune_export.graph.count import count_bundle
from infoprune_export.models.families import find_anatomy
from infoprune_export.models.flops import count
from infoprune_export.plans import Budget, LayerPlan, Plan, Source
from infoprune_export.recipe import Criterion, Workload

WORKLOAD = Workload(image_tokens=16, text_tokens=5, new_tokens=3)


@pytest.fixture(scope="module", params=[("clip", "llama"), ("siglip", "qwen2"), ("dinov2", "gemma")])
def anatomy(request):
    return find_anatomy(build(*request.param))


def _components(anatomy, make, directory, dtype="fp32", shared=False):
    vision, language = ([make(x) for x in anatomy.tower(t).layers] for t in ("vision", "language"))
    stacks.vision(directory / graph_file(VISION, dtype), anatomy, vision, dtype)
    stacks.decoder(directory / graph_file(DECODER, dtype), anatomy, language, dtype, shared)
    return directory


@pytest.mark.parametrize(("groups", "rank"), [(None, None), (2, 6)])
def test_they_have_the_flops_of_what_they_stand_in_for(anatomy, tmp_path, groups, rank):
    kept = [
        LayerPlan(
            tower=x.tower,
            layer=x.index,
            kv_groups=list(range(groups or x.attention.kv_groups)),
            heads=list(range((groups or x.attention.kv_groups) * x.attention.heads_per_group)),
            ranks=dict.fromkeys(x.ffn.matrices, rank),
        )
        for x in anatomy.layers()
    ]
    budget = Budget(scope="all", requested=1, predicted=1, original_flops=1, compressed_flops=1)
    source = Source(id="x", sha256="0" * 64)
    plan = Plan(source=source, criterion=Criterion(), workload=WORKLOAD, budget=budget, layers=kept, anatomy=anatomy)
    make = lambda x: Block(x, groups or x.attention.kv_groups, dict.fromkeys(x.ffn.matrices, rank))
    found, expected = count_bundle(_components(anatomy, make, tmp_path), WORKLOAD), count(anatomy, WORKLOAD, plan).parts()
    assert found["vision"] == expected["vision"] + expected["projector"]  # nothing marks the projector of a stand-in
    assert (found["prefill"], found["decode"]) == (expected["prefill"], expected["decode"])


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("shared", [False, True])
def test_they_run_and_stay_finite_and_small(anatomy, tmp_path, dtype, shared):
    _components(anatomy, stacks.whole, tmp_path, dtype, shared)
    vision = OrtEngine.open(tmp_path / graph_file(VISION, dtype), 1)
    features = vision.run({"pixel_values": np.ones((2, 3, 16, 16), vision.inputs[0].dtype)})["image_features"]
    assert features.shape == (2, anatomy.geometry.image_tokens, anatomy.language.hidden)
    assert np.isfinite(features).all()
    decoder = OrtEngine.open(tmp_path / graph_file(DECODER, dtype), 1)
    feeds = {"attention_mask": np.ones((1, 9), np.int64), "position_ids": np.arange(4, 9)[None]}
    sizes = {"batch": 1, "sequence": 5, "past": 4, "capacity": 4}
    for x in decoder.inputs:
        if x.name not in feeds:
            feeds[x.name] = np.ones([sizes.get(n, n) for n in x.shape], x.dtype)
    results = decoder.run(feeds)
    assert np.isfinite(results["logits"]).all()
    assert results["present.0.key"].shape[2] == 9
    assert all(path.stat().st_size < 100_000 for path in tmp_path.iterdir())


def test_no_two_weights_are_alike(anatomy, tmp_path):
    graph = onnx.load(stacks.decoder(tmp_path / "decoder.onnx", anatomy, [stacks.whole(x) for x in anatomy.language.layers], "fp32")).graph
    fillers = [onnx.numpy_helper.to_array(n.attribute[0].t).item() for n in graph.node if n.op_type == "ConstantOfShape"]
    weights = [(n.input[0], value) for n, value in zip((n for n in graph.node if n.op_type == "ConstantOfShape"), fillers, strict=True)]
    assert len(set(weights)) == len(weights)  # equal ones would be merged, and their products with them
