"""Quantised graphs of whole networks, with uneven heads and ranks, against PyTorch with the same numbers as weights."""

import copy

import numpy as np
import pytest
import torch
from comparison import Graphs, Stock, assert_same_network
from networks import build
from quantised import matrices, operators
from uneven import WORKLOAD, random_factors, uneven_plan

from infoprune_export.bundle import DECODER, VISION, graph_file
from infoprune_export.compress.surgery import apply_plan
from infoprune_export.engines.onnxruntime import build as build_engine
from infoprune_export.engines.quantise import quantise_graphs
from infoprune_export.graph.count import count_bundle
from infoprune_export.graph.export import export_graphs
from infoprune_export.models.families import find_anatomy


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def network(request, tmp_path_factory):
    """A compressed model, with an output head of its own or on the embedding's table, and the directory of its graphs."""
    model = build(language=request.param)
    anatomy = find_anatomy(model)
    plan = uneven_plan(anatomy)
    apply_plan(model, plan, random_factors(plan))
    directory = tmp_path_factory.mktemp("graphs")
    export_graphs(model, anatomy, directory)
    for weights in ("int4", "int8"):
        quantise_graphs(directory, "fp32", weights)
    return model, directory


def with_weights(model, directory, precision):
    """The model with the matrices that its quantised graphs hold."""
    model = copy.deepcopy(model)
    if model.lm_head.weight is model.get_input_embeddings().weight:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    for component in (VISION, DECODER):
        for name, matrix in matrices(directory / graph_file(component, precision)).items():
            parameter = model.get_parameter(name)
            assert parameter.shape == matrix.T.shape
            parameter.data = torch.from_numpy(np.ascontiguousarray(matrix.T))
    return model


@pytest.mark.parametrize("precision", ["q4", "int8"])
def test_the_graphs_compute_what_pytorch_does_with_these_weights(network, precision):
    model, directory = network
    changed = with_weights(model, directory, precision)
    assert_same_network(Graphs(directory, precision), Stock(changed), atol=1e-5)
    with pytest.raises(AssertionError):
        assert_same_network(Graphs(directory, precision), Stock(model), atol=1e-4)


@pytest.mark.parametrize("precision", ["q4", "int8"])
def test_every_linear_map_is_quantised_and_fuses(network, precision, tmp_path):
    model, directory = network
    layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    run = [n for n in layers if "encoder.layers.2" not in n]  # the features are those of the tower's last layer but one
    total = 0
    for component in (VISION, DECODER):
        graph = directory / graph_file(component, precision)
        found = matrices(graph)
        assert set(found) == {f"{n}.weight" for n in run if ("vision" in n or "multi_modal" in n) == (component == VISION)}
        built = operators(build_engine(graph, tmp_path / graph.name))
        assert built["MatMulNBits"] == len(found) and "DequantizeLinear" not in built
        total += len(found)
    assert total == len(run)


@pytest.mark.parametrize("precision", ["q4", "int8"])
def test_flops_are_those_of_the_float_graphs(network, precision):
    _, directory = network
    assert count_bundle(directory, WORKLOAD, precision) == count_bundle(directory, WORKLOAD)
