"""Exported graphs against the stock PyTorch forward, family by family."""

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from comparison import Graphs, Stock, assert_same_network
from networks import build

from infoprune_export.bundle import COMPONENTS, DECODER, EMBED, VISION, graph_file
from infoprune_export.engines.graphs import read_graph
from infoprune_export.engines.primitives import OPSET, write_out
from infoprune_export.errors import InputError
from infoprune_export.graph.export import export_graphs
from infoprune_export.models.families import find_anatomy


def shallow(model):
    """The same model with one layer run in each tower, where depth would prove nothing."""
    vision = model.model.vision_tower
    stack = vision.encoder.layer if hasattr(vision.encoder, "layer") else vision.encoder.layers
    del stack[2:]
    vision.config.num_hidden_layers = 2
    language = model.model.language_model
    del language.layers[1:]
    language.config.num_hidden_layers = 1
    return model


def export(model, directory, dtype="fp32"):
    export_graphs(model, find_anatomy(model), directory, dtype)
    return Graphs(directory, dtype)


def test_clip_and_llama(exported):
    model, _, directory = exported
    assert_same_network(Graphs(directory), Stock(model), atol=1e-5)


@pytest.mark.parametrize(
    ("vision", "language"), [("siglip", "gemma"), ("dinov2", "qwen2"), pytest.param("clip", "mistral", marks=pytest.mark.slow)]
)
def test_families(vision, language, tmp_path):
    model = shallow(build(vision, language))
    assert_same_network(export(model, tmp_path), Stock(model), atol=1e-5)
    graph = onnx.load(tmp_path / graph_file(DECODER), load_external_data=False).graph
    (table,) = [i for i in graph.initializer if set(i.dims) == {104, 48}]
    location = {e.key: e.value for e in table.external_data}["location"]
    tied = model.config.tie_word_embeddings  # a tied table is stored once, in the embedding's file
    assert location == ("embed_tokens.onnx_data" if tied else "decoder_model_merged.onnx_data")
    for component in (VISION, DECODER):
        assert written_out(tmp_path / graph_file(component))
    assert_same_network(Graphs(tmp_path), Stock(model), atol=1e-5)  # in older operators, too


def written_out(path):
    """Puts a graph of operators that every TensorRT reads in the place of another; returns what had to be written out."""
    graph = read_graph(path)
    written = write_out(graph, lambda operator: operator not in ("Attention", "Gelu", "RMSNormalization", "RotaryEmbedding"))
    onnx.save(graph, path)
    onnx.checker.check_model(str(path), full_check=True)
    assert graph.opset_import[0].version == OPSET
    return written


def test_sliding_window_in_every_layer(tmp_path):
    model, whole = shallow(build(language="mistral")), Stock(shallow(build(language="mistral")))
    model.model.language_model.config.sliding_window = 3
    graphs = export(model, tmp_path)
    assert_same_network(graphs, Stock(model), atol=1e-5)
    with pytest.raises(AssertionError):  # the window matters
        assert_same_network(graphs, whole, atol=1e-5)


@pytest.mark.slow
def test_sliding_window_in_some_layers(tmp_path):
    model = build(language="qwen2")
    language = model.model.language_model
    del language.layers[2:]
    language.config.num_hidden_layers = 2
    language.config.sliding_window, language.has_sliding_layers = 3, True
    language.config.layer_types = ["full_attention", "sliding_attention"]
    assert_same_network(export(model, tmp_path), Stock(model), atol=1e-5)


@pytest.mark.slow
def test_several_feature_layers(tmp_path):
    model = shallow(build(vision_feature_layer=[-2, 0], vision_feature_select_strategy="full"))
    assert_same_network(export(model, tmp_path), Stock(model), atol=1e-5)


def test_names_axes_and_types(exported):
    _, _, directory = exported
    ports = {}
    for component in COMPONENTS:
        graph = onnx.load(directory / graph_file(component), load_external_data=False).graph
        ports[component] = {
            v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)
        }
    assert ports[VISION] == {"pixel_values": ["images", 3, 16, 16], "image_features": ["images", 16, 48]}
    assert ports[EMBED] == {"input_ids": ["batch", "sequence"], "inputs_embeds": ["batch", "sequence", 48]}
    decoder = {
        "inputs_embeds": ["batch", "sequence", 48],
        "attention_mask": ["batch", "past + sequence"],
        "position_ids": ["batch", "sequence"],
        "logits": ["batch", 1, 104],
    }
    for i in range(3):
        for name in ("key", "value"):
            decoder[f"past_key_values.{i}.{name}"] = ["batch", 3, "past", 8]
            decoder[f"present.{i}.{name}"] = ["batch", 3, "past + sequence", 8]
    assert ports[DECODER] == decoder


def test_graphs_pass_the_checker_and_hold_only_what_runs(exported):
    _, _, directory = exported
    for component in COMPONENTS:
        onnx.checker.check_model(str(directory / graph_file(component)), full_check=True)
    names = {i.name for i in onnx.load(directory / graph_file(VISION), load_external_data=False).graph.initializer}
    assert "model.vision_tower.encoder.layers.1.mlp.fc1.weight" in names
    assert not any(".layers.2." in n for n in names)  # the feature layer is the last but one
    operators = [n.op_type for n in onnx.load(directory / graph_file(DECODER), load_external_data=False).graph.node]
    assert {op: operators.count(op) for op in ("Attention", "RotaryEmbedding", "RMSNormalization", "Expand")} == {
        "Attention": 3, "RotaryEmbedding": 6, "RMSNormalization": 7, "Expand": 0,
    }  # fmt: skip


EXPORT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from networks import build
from infoprune_export.graph.export import export_graphs
from infoprune_export.models.families import find_anatomy
model = build()
export_graphs(model, find_anatomy(model), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_same_bytes_in_another_process_and_directory(exported, tmp_path):
    _, _, directory = exported
    there = tmp_path / "some where else"
    environment = {**os.environ, "PYTHONHASHSEED": "5"}
    subprocess.run([sys.executable, "-c", EXPORT, str(Path(__file__).parents[1]), str(there)], check=True, env=environment)
    for file in sorted(directory.iterdir()):
        assert file.read_bytes() == (there / file.name).read_bytes(), file.name


def test_graphs_tell_nothing_of_where_they_were_made(exported):
    _, _, directory = exported
    for component in COMPONENTS:
        content = (directory / graph_file(component)).read_bytes()
        for trace in (b"site-packages", b".py", b"pkg.torch", b"stack_trace", str(directory).encode()):
            assert trace not in content


@pytest.mark.parametrize("dtype", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_half_precision(dtype, tmp_path):
    model = shallow(build(language="qwen2"))
    before = {n: (p.data_ptr(), p.dtype) for n, p in model.named_parameters()}
    export_graphs(model, find_anatomy(model), tmp_path, "fp32", dtype)
    assert {n: (p.data_ptr(), p.dtype) for n, p in model.named_parameters()} == before
    assert model.config.text_config._attn_implementation != "infoprune_export"
    element = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[dtype]
    for component in COMPONENTS:
        graph = onnx.load(tmp_path / graph_file(component, dtype), load_external_data=False).graph
        large = [i for i in graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL]
        assert {i.data_type for i in large} == {element}
        assert {v.type.tensor_type.elem_type for v in graph.output} == {element}
    assert_same_network(Graphs(tmp_path), Stock(model), atol=1e-5)  # from the same trace
    if dtype == "fp16":  # ONNX Runtime has no bf16 kernels on the CPU
        assert_same_network(Graphs(tmp_path, dtype), Stock(model), atol=1e-2)


def test_what_no_graph_can_express_is_refused(tmp_path):
    model = build()
    model.model.language_model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(InputError, match="rotary embedding of type 'dynamic'"):
        export_graphs(model, find_anatomy(model), tmp_path / "out")
    model = build()
    model.model.language_model.config.attn_logit_softcapping = 50.0
    with pytest.raises(InputError, match="soft cap"):
        export_graphs(model, find_anatomy(model), tmp_path / "out")
    model = build()
    model.model.language_model.config.layer_types = ["chunked_attention"] * 3
    with pytest.raises(InputError, match="attention of kind 'chunked_attention'"):
        export_graphs(model, find_anatomy(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_equal_weights_stay_apart(tmp_path):
    model = shallow(build())
    attention = model.model.vision_tower.encoder.layers[0].self_attn
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(attention, name).bias.zero_()
    export_graphs(model, find_anatomy(model), tmp_path)
    names = {i.name for i in onnx.load(tmp_path / graph_file(VISION), load_external_data=False).graph.initializer}
    assert {f"model.vision_tower.encoder.layers.0.self_attn.{n}_proj.bias" for n in "qkv"} <= names


def test_a_model_laid_out_gives_the_same_files(tmp_path):
    from infoprune_export.models.load import locate

    build("clip", "qwen2").save_pretrained(tmp_path / "model")
    source = locate(str(tmp_path / "model"))
    for name, model in (("whole", source.load_model()), ("laid out", source.open_model())):
        export_graphs(model, find_anatomy(model), tmp_path / name, "fp16")
    files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert len(files) == 6
    assert all((tmp_path / "whole" / f).read_bytes() == (tmp_path / "laid out" / f).read_bytes() for f in files)
