"""Checkpoints as they come: in shards, in other types, with parts missing, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def tensors(small_model) -> dict[str, torch.Tensor]:
    return load_file(small_model / WEIGHTS)


@pytest.fixture
def written(small_model, tmp_path):
    """Writes a model of tensors, whole or with every other tensor in a second shard; gives its directory."""

    def write(tensors, shards=False, name="model", **config) -> Path:
        directory = Path(shutil.copytree(small_model, tmp_path / name))
        (directory / WEIGHTS).unlink()
        if config:
            made = json.loads((directory / "config.json").read_text()) | config
            (directory / "config.json").write_text(json.dumps(made))
        if not shards:
            save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
            return directory
        names = sorted(tensors)
        for shard, keys in zip(SHARDS, (names[::2], names[1::2]), strict=True):
            save_file({k: tensors[k] for k in keys}, directory / shard, metadata={"format": "pt"})
        weight_map = {k: SHARDS[i % 2] for i, k in enumerate(names)}
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return directory

    return write


@pytest.fixture
def planned(run, tmp_path):
    """What is kept of every layer of a model, and what was said."""

    def plan(model):
        done = run(model, "--flops", "0.7", "--samples", "8", "--dry-run", "--json", cwd=tmp_path)
        return json.loads(done.stdout)["layers"], done.stderr

    return plan


@pytest.fixture
def refused(run, tmp_path):
    """Exports a model that must be refused without a trace; gives the message."""

    def refuse(model):
        message = run(model, "--out", tmp_path / "new" / "out", code=2).stderr
        assert not (tmp_path / "new").exists()
        return message

    return refuse


def test_shards_make_the_same_model_as_one_file(written, planned, tensors, small_model):
    assert planned(written(tensors, shards=True))[0] == planned(small_model)[0]


def test_a_missing_shard(written, refused, tensors):
    model = written(tensors, shards=True)
    (model / SHARDS[1]).unlink()
    assert f"{model}: shard {SHARDS[1]} is missing\nfetch the checkpoint again" in refused(model)


def test_a_truncated_shard(written, refused, tensors):
    model = written(tensors, shards=True)
    (model / SHARDS[1]).write_bytes((model / SHARDS[1]).read_bytes()[:-100])
    assert f"{SHARDS[1]}: is not a whole safetensors file" in refused(model)


def test_an_index_that_names_absent_tensors(written, refused, tensors):
    model = written(tensors, shards=True)
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["a.weight.of.nothing"] = SHARDS[0]
    (model / INDEX).write_text(json.dumps(index))
    assert f"{INDEX}: names 1 tensors that their shards do not have (the first, a.weight.of.nothing, in {SHARDS[0]})" in refused(model)


def test_a_shard_that_lacks_a_tensor_of_the_index(written, refused, tensors):
    model = written(tensors, shards=True)
    shard = load_file(model / SHARDS[0])
    lost = sorted(shard)[3]
    save_file({k: t for k, t in shard.items() if k != lost}, model / SHARDS[0], metadata={"format": "pt"})
    assert f"{INDEX}: names 1 tensors that their shards do not have (the first, {lost}, in {SHARDS[0]})" in refused(model)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "is not a weight index"),
        ("[]", "is not a weight index"),
        ('{"weight_map": 3}', "is not a weight index"),
        ('{"weight_map": {"a": 3}}', "shard 3 is missing"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "shard ../b.safetensors is missing"),
    ],
)
def test_an_index_that_is_none(written, refused, tensors, index, said):
    model = written(tensors, shards=True)
    (model / INDEX).write_text(index)
    assert said in refused(model)


def test_a_bf16_checkpoint_is_computed_with_as_it_is(written, planned, tensors):
    half = {k: t.bfloat16() for k, t in tensors.items()}
    layers, said = planned(written(half, name="bf16"))
    assert layers == planned(written({k: t.float() for k, t in half.items()}, name="fp32"))[0]
    assert "several types" not in said


def test_shards_of_different_types_work_and_are_told(written, planned, tensors):
    mixed = {k: t.half() if i % 2 else t.half().float() for i, k in enumerate(sorted(tensors)) for t in [tensors[k]]}
    layers, said = planned(written(mixed, shards=True, name="mixed"))
    assert "the weights are of several types (F16, F32)" in said
    assert layers == planned(written({k: t.float() for k, t in mixed.items()}, name="fp32"))[0]


def test_an_fp8_checkpoint_is_refused(written, refused, tensors):
    eighth = {k: t.to(torch.float8_e4m3fn) if k.endswith("mlp.up_proj.weight") else t for k, t in tensors.items()}
    message = refused(written(eighth))
    assert "2 tensors are quantised (the first, " in message and "up_proj.weight, is F8_E4M3)" in message
    assert "take the checkpoint that it was made from, in float16, bfloat16 or float32" in message


def test_a_quantised_checkpoint_is_refused_by_its_config(written, refused, tensors):
    model = written(tensors, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert "config.json: the weights are quantised (fp8)" in refused(model)


def test_tied_weights_are_kept_once(bundle, small_model):
    """In PyTorch's weights and in the graphs: the decoder reads its output head from the embedding's file."""
    import onnx

    assert json.loads((small_model / "config.json").read_text())["tie_word_embeddings"]
    assert not [key for key in load_file(bundle / "model" / WEIGHTS) if "lm_head" in key]
    decoder = onnx.load(bundle / "onnx" / "decoder_model_merged.onnx", load_external_data=False)
    places = {entry.value for t in decoder.graph.initializer for entry in t.external_data if entry.key == "location"}
    assert "embed_tokens.onnx_data" in places


def test_a_checkpoint_that_holds_tied_weights_twice(written, planned, tensors, small_model):
    embedding = next(k for k in tensors if k.endswith("embed_tokens.weight"))
    twice = tensors | {"language_model.lm_head.weight": tensors[embedding].clone()}
    assert planned(written(twice))[0] == planned(small_model)[0]
