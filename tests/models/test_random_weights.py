"""Checkpoints of random weights: their shapes, their spectra, and what a network of them does."""

from __future__ import annotations

import json

import networks
import pytest
import torch

from infoprune_export.errors import InputError
from infoprune_export.models import load, random_weights
from infoprune_export.models.load import locate, packaged_config
from infoprune_export.models.random_weights import RandomCheckpoint


@pytest.fixture
def config(tmp_path):
    """Writes the config of one of the small test networks; gives its path."""

    def write(*families, dtype="float32", **llava):
        made = networks.build(*families, **llava).config
        made.dtype = getattr(torch, dtype)
        made.save_pretrained(tmp_path / "config")
        return tmp_path / "config" / "config.json"

    return write


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.mark.parametrize("families", [("clip", "llama"), ("siglip", "qwen2"), ("dinov2", "gemma")])
def test_it_loads_and_its_answers_depend_on_what_is_asked(config, tmp_path, families):
    RandomCheckpoint(config(*families), 0).write(tmp_path / "made")
    model = locate(str(tmp_path / "made")).load_model().requires_grad_(True)
    x = networks.inputs(batch=3)
    logits = model(**x).logits
    assert logits.isfinite().all()
    directions = torch.nn.functional.normalize(logits[:, -1], dim=-1)
    assert (directions @ directions.T).triu(1).max() < 0.9
    logits.logsumexp(-1).sum().backward()
    assert (logits[..., networks.IMAGE_TOKEN] == 0).all() and logits.max(-1).values.min() > 0.1
    norms = [p.grad.norm() / p.norm() for name, p in model.named_parameters() if "language" in name and name.endswith("proj.weight")]
    assert len(norms) == 21 and min(norms) > 1e-3 * max(norms) > 0


def test_the_same_seed_gives_the_same_bytes(config, tmp_path):
    path = config()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        RandomCheckpoint(path, seed).write(tmp_path / name)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert {name for name in a.keys() & c.keys() if a[name] != c[name]} == {"model-00001-of-00001.safetensors"}


def test_shards_are_small_and_half_done_work_goes_on(config, tmp_path, monkeypatch):
    monkeypatch.setattr(random_weights, "SHARD_BYTES", 20_000)
    checkpoint, out = RandomCheckpoint(config(), 0), tmp_path / "made"
    checkpoint.write(out)
    whole, shards = contents(out), sorted(out.glob("*.safetensors"))
    assert len(shards) > 3
    assert set(json.loads(whole["model.safetensors.index.json"])["weight_map"].values()) == {p.name for p in shards}
    assert sum(p.stat().st_size for p in shards) > checkpoint.bytes

    shards[2].unlink()
    (out / "model.safetensors.index.json").unlink()
    (out / f"{shards[2].name}.part").write_bytes(b"half")
    kept = shards[0].stat().st_mtime_ns
    done = []
    checkpoint.write(out, done.append)
    assert contents(out) == whole and shards[0].stat().st_mtime_ns == kept
    assert sum(done) == checkpoint.tensors

    RandomCheckpoint(config(), 1).write(out)  # another checkpoint in the same place takes over nothing
    assert all((out / p.name).read_bytes() != whole[p.name] for p in shards)


def test_tied_tables_are_stored_once_and_in_the_type_of_the_config(config, tmp_path):
    from safetensors import safe_open

    RandomCheckpoint(config("clip", "qwen2", dtype="float16"), 0).write(tmp_path / "made")
    with safe_open(tmp_path / "made" / "model-00001-of-00001.safetensors", "pt") as f:
        assert not [key for key in f.keys() if "lm_head" in key]  # noqa: SIM118 (not a mapping)
        assert {f.get_slice(key).get_dtype() for key in f.keys()} == {"F16"}  # noqa: SIM118
    model = locate(str(tmp_path / "made")).load_model()
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (96, 64), (64, 144), (37, 53)])
def test_spectra_decay_slowly_and_outputs_keep_the_scale_of_inputs(config, rows, columns):
    checkpoint = RandomCheckpoint(config(), 0)
    values = random_weights._Values(checkpoint.model, checkpoint.anatomy, 0)
    blocks = list(values._matrix("some.weight", rows, columns, torch.Generator().manual_seed(0)))
    matrix = torch.cat(blocks)
    assert matrix.shape == (rows, columns)
    assert matrix.square().mean() * columns == pytest.approx(1, rel=0.25)
    spectrum = torch.linalg.svdvals(matrix)
    half = len(spectrum) // 2
    assert 0.01 < spectrum[half:].square().sum() / spectrum.square().sum() < 0.4


def test_a_head_says_more_than_another(config):
    checkpoint = RandomCheckpoint(config(), 0)
    values = random_weights._Values(checkpoint.model, checkpoint.anatomy, 0)
    layer = checkpoint.anatomy.language.layers[0].attention
    name, width = f"{layer.o.path}.weight", layer.heads * layer.head_dim
    matrix = torch.cat(list(values._matrix(name, layer.o.d_out, width, torch.Generator().manual_seed(0))))
    norms = matrix.view(-1, layer.heads, layer.head_dim).norm(dim=(0, 2))
    assert norms.max() > 1.5 * norms.min()


def test_the_processor_is_one_for_transformers_and_the_runtime_alike(config, tmp_path):
    from infoprune_export.data.synthetic import synthetic_questions
    from infoprune_export.runtime.images import ImageProcessor
    from infoprune_export.runtime.prompts import Prompts

    out = tmp_path / "made"
    RandomCheckpoint(config(), 0).write(out)
    theirs, prompts, images = locate(str(out)).load_processor(), Prompts.from_directory(out), ImageProcessor.from_directory(out)
    question = synthetic_questions(["w3", "w17", "w103"], 1, length=9, answer=2, side=16)[0]
    expected = theirs(images=[question.image.open()], text=prompts.render(question.question, 1), return_tensors="np")
    ids = prompts.encode(question.question, 1)
    assert (expected["input_ids"][0] == ids).all() and len(ids) == 1 + networks.IMAGE_TOKENS + 9
    assert (ids == networks.IMAGE_TOKEN).sum() == networks.IMAGE_TOKENS and ids[0] == 1
    assert abs(expected["pixel_values"] - images([question.image.open()])).max() < 1e-6
    assert list(prompts.encode_answer("w17 w103")) == [17, 103, 2]


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("llava-hf/llava-1.5-7b-hf", 7_063_427_072), ("llava-hf/llava-1.5-13b-hf", 13_351_494_656), ("./build/smol-llava-model", None)],
)
def test_packaged_configs_have_the_sizes_of_their_models(model, parameters):
    checkpoint = RandomCheckpoint(packaged_config(model), 0)
    if parameters:
        assert checkpoint.bytes == 2 * parameters
        assert checkpoint.anatomy.geometry.image_tokens == 576
    assert max(map(sum, ([t.bytes for t in shard] for shard in checkpoint.shards))) <= random_weights.SHARD_BYTES


def test_configs_that_make_no_model(config, tmp_path):
    path = config()
    parsed = json.loads(path.read_text())
    for content, message in (
        ("{", "not JSON"),
        (json.dumps({**parsed, "model_type": "mamba"}), "families known: llava"),
        (json.dumps({**parsed, "text_config": {**parsed["text_config"], "num_attention_heads": "six"}}), "no model can be made of it"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            RandomCheckpoint(path, 0)


def test_only_a_config_is_looked_for(config):
    path = config()
    assert load.locate_config(str(path.parent)) == (path, path.parent.name)
    with pytest.raises(InputError, match="no such model directory"):
        load.locate_config("./nowhere/at/all")
