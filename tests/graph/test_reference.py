"""The recorded reference: against stock generation, against the graphs, and read without PyTorch."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from comparison import Graphs, pixels
from networks import IMAGE_TOKEN, IMAGE_TOKENS

from infoprune_export.errors import InputError
from infoprune_export.graph.reference import record_reference
from infoprune_export.validation.reference import ReferencePrompt, read_reference

EOS, NEW_TOKENS = 7, 6


def prompts(n=12):
    rng = np.random.default_rng(0)
    made = []
    for i in range(n):
        text = rng.integers(3, 90, rng.integers(2, 9))
        image = i % 3 if i % 4 else None
        made.append(ReferencePrompt(text if image is None else np.concatenate([np.full(IMAGE_TOKENS, IMAGE_TOKEN), text]), image))
    return made


@pytest.fixture(scope="module")
def recorded(exported, tmp_path_factory):
    model, _, _ = exported
    path = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    record_reference(model, prompts(), pixels(), path, NEW_TOKENS, [EOS], features=2, logits=5)
    return path


def test_tokens_are_those_of_stock_generation(exported, recorded):
    model, _, _ = exported
    reference = read_reference(recorded)
    assert [len(p.input_ids) for p in reference.prompts] == [len(p.input_ids) for p in prompts()]
    for prompt, ids in zip(reference.prompts, reference.generated, strict=True):
        inputs = {"input_ids": torch.from_numpy(prompt.input_ids)[None]}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if prompt.image is not None:
            inputs["pixel_values"] = torch.from_numpy(reference.pixel_values[prompt.image, None])
        out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=EOS, pad_token_id=0)
        assert out[0, len(prompt.input_ids) :].tolist() == ids.tolist()


def test_graphs_generate_the_same_tokens(exported, recorded):
    _, _, directory = exported
    reference, graphs = read_reference(recorded), Graphs(directory)
    features = graphs.vision(reference.pixel_values)
    np.testing.assert_allclose(features[:2], reference.image_features, rtol=0, atol=1e-4)
    for i, (prompt, wanted) in enumerate(zip(reference.prompts, reference.generated, strict=True)):
        embeds = graphs.embed(prompt.input_ids[None])
        if prompt.image is not None:
            embeds[0, prompt.input_ids == reference.image_token_id] = features[prompt.image]
        past, seen, ids = None, 0, []
        while len(ids) < reference.max_new_tokens and not set(ids) & set(reference.eos_token_ids):
            seen, start = seen + embeds.shape[1], seen
            logits, past = graphs.decode(embeds, np.ones((1, seen), np.int64), np.arange(start, seen)[None], past)
            if not ids and i < len(reference.logits):
                np.testing.assert_allclose(logits[0, 0], reference.logits[i], rtol=0, atol=1e-4)
            ids.append(int(logits.argmax()))
            embeds = graphs.embed(np.array([[ids[-1]]]))
        assert ids == wanted.tolist()


def test_end_of_sequence_ends_a_continuation(exported, tmp_path):
    model, _, _ = exported
    free = record_reference(model, prompts(), pixels(), tmp_path / "free", NEW_TOKENS, [])
    assert {len(g) for g in free.generated} == {NEW_TOKENS}
    end = int(free.generated[0][2])
    ended = record_reference(model, prompts(), pixels(), tmp_path / "ended", NEW_TOKENS, [end])
    for whole, cut in zip(free.generated, ended.generated, strict=True):
        stop = np.flatnonzero(whole == end)
        assert cut.tolist() == whole[: stop[0] + 1 if len(stop) else None].tolist()


def test_same_bytes_every_time(exported, recorded, tmp_path):
    model, _, _ = exported
    record_reference(model, prompts(), pixels(), tmp_path / "again", NEW_TOKENS, [EOS], features=2, logits=5)
    assert (tmp_path / "again").read_bytes() == recorded.read_bytes()


def test_reading_needs_no_pytorch(recorded):
    code = f"""
import sys
from pathlib import Path
from infoprune_export.validation.reference import read_reference
assert len(read_reference(Path({str(recorded)!r})).prompts) == 12
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_image_tokens_that_do_not_match_are_refused(exported, tmp_path):
    model, _, _ = exported
    short = ReferencePrompt(np.array([IMAGE_TOKEN, 3, 4]), 0)
    with pytest.raises(InputError, match="prompt 0: has 1 image tokens where its image takes 16"):
        record_reference(model, [short], pixels(), tmp_path / "r", NEW_TOKENS, [EOS])
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign"])
def test_a_damaged_file_is_named(recorded, tmp_path, damage):
    path = tmp_path / "reference.safetensors"
    if damage == "truncated":
        path.write_bytes(recorded.read_bytes()[:-9])
    if damage == "foreign":
        from safetensors.numpy import save_file

        save_file({"x": np.zeros(3)}, path)
    with pytest.raises(InputError, match=r"reference\.safetensors: is not a readable reference"):
        read_reference(path)
