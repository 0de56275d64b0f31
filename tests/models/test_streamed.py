"""Models laid out: the same as whole ones, with no more in memory than is at hand."""

from __future__ import annotations

import pytest
import torch
from networks import LANGUAGE, VISION, build, inputs
from safetensors.torch import load_file, save_file

from infoprune_export.errors import InputError
from infoprune_export.models.families import find_anatomy
from infoprune_export.models.load import locate
from infoprune_export.models.streamed import at_hand, load_all, tables_at_hand


def saved(tmp_path, vision="clip", language="llama", **options):
    model = build(vision, language)
    model.save_pretrained(tmp_path / "model", **options)
    return model, locate(str(tmp_path / "model"))


@pytest.mark.parametrize(("vision", "language"), [*((v, "llama") for v in VISION), *(("clip", x) for x in LANGUAGE if x != "llama")])
def test_a_loaded_model_is_the_saved_one(tmp_path, vision, language):
    model, source = saved(tmp_path, vision, language)
    again = source.load_model()
    ours, expected = again.state_dict(), model.state_dict()
    assert ours.keys() == expected.keys() and all(torch.equal(ours[k], expected[k]) for k in expected)
    for (name, mine), (_, its) in zip(again.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(mine, its), name
    x = inputs()
    assert torch.equal(again(**x).logits, model(**x).logits)
    assert not again.training and not any(p.requires_grad for p in again.parameters())


def test_layers_have_weights_only_while_they_are_at_hand(tmp_path):
    model, source = saved(tmp_path)
    out = source.open_model()
    anatomy = find_anatomy(out)
    held = {n for n, p in out.named_parameters() if not p.is_meta}
    assert not any(n.startswith(x.path) for n in held for x in anatomy.layers())
    assert any("layers.2" in n for n in held), "the vision layer that feeds nothing is part of what the model runs"
    layer = anatomy.language.layers[1]
    with at_hand(out, layer.path) as module:
        for name, p in module.named_parameters():
            assert torch.equal(p, model.get_parameter(f"{layer.path}.{name}"))
        with at_hand(out, layer.path):
            pass
        assert not next(module.parameters()).is_meta, "who borrows what is at hand does not take it away"
    assert all(p.is_meta for p in module.parameters())
    with pytest.raises(RuntimeError), at_hand(out, layer.path):
        raise RuntimeError
    assert all(p.is_meta for p in module.parameters())


@pytest.mark.parametrize("language", ["llama", "qwen2"])
def test_embedding_and_head_have_weights_only_while_they_are_at_hand_and_stay_tied(tmp_path, language):
    model, source = saved(tmp_path, language=language)
    out = source.open_model()
    embedding, head, tied = out.get_input_embeddings(), out.lm_head, language == "qwen2"

    def there() -> list[bool]:
        assert (head.weight is embedding.weight) == tied
        return [not x.weight.is_meta for x in (embedding, head)]

    for _ in range(2):
        assert there() == [False, False]
        with pytest.raises(KeyError), tables_at_hand(out, find_anatomy(out)):
            assert there() == [True, True]
            assert torch.equal(embedding.weight, model.get_input_embeddings().weight) and torch.equal(head.weight, model.lm_head.weight)
            raise KeyError
    with tables_at_hand(model, find_anatomy(model)):
        pass
    assert torch.equal(model.lm_head.weight, load_all(out).lm_head.weight), "what is in memory stays there"
    assert there() == [True, True]


def test_what_is_outside_the_layers_goes_to_the_device_and_nothing_is_moved_from_where_there_are_no_weights(tmp_path, monkeypatch):
    source = saved(tmp_path)[1]
    monkeypatch.setattr(torch.nn.Module, "to", None)  # of weights that are not there it fails, whatever the device
    out = source.open_model("meta")
    assert {b.device.type for b in out.buffers()} == {p.device.type for p in out.parameters()} == {"meta"}


def test_a_whole_model_keeps_what_is_changed():
    model = build()
    with at_hand(model, "model.language_model.layers.0") as layer:
        layer.mlp.up_proj.weight.zero_()
    assert not model.model.language_model.layers[0].mlp.up_proj.weight.any()


def test_what_is_changed_in_memory_stays_out_of_the_file(tmp_path):
    _, source = saved(tmp_path)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    for p in load_all(source.open_model()).parameters():
        p.data.zero_()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


NESTINGS = {
    "today's module tree": {},
    "before version 4.52": {
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    },
}


def rename(state, nesting):
    """Weights under the names that a version of transformers had for them."""

    def old(name):
        new = next((n for n in nesting if name.startswith(n)), "")
        return nesting.get(new, "") + name.removeprefix(new)

    return {old(name): t.clone() for name, t in state.items()}


@pytest.mark.parametrize("language", ["llama", "qwen2"])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_names_of_other_versions_are_understood(tmp_path, language, nesting):
    model, _ = saved(tmp_path, "clip", language)
    save_file(
        rename(dict(model.named_parameters()), NESTINGS[nesting]), tmp_path / "model" / "model.safetensors", metadata={"format": "pt"}
    )
    again = locate(str(tmp_path / "model")).load_model()
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in model.named_parameters())


def test_several_shards_and_half_precision(tmp_path):
    model = build().half()
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    again = locate(str(tmp_path / "model")).load_model()
    assert all(p.dtype == torch.float32 for p in again.parameters())
    assert all(torch.equal(p.float(), again.get_parameter(n)) for n, p in model.named_parameters())


@pytest.mark.parametrize("tied_name", ["language_model.lm_head.weight", "language_model.model.embed_tokens.weight"])
def test_a_tied_table_is_one_whichever_name_it_has_in_the_file(tmp_path, tied_name):
    model, _ = saved(tmp_path, "clip", "qwen2")
    path = tmp_path / "model" / "model.safetensors"
    state = load_file(path)
    table = state.pop("language_model.model.embed_tokens.weight")
    save_file({**state, tied_name: table}, path, metadata={"format": "pt"})
    again = locate(str(tmp_path / "model")).load_model()
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(("change", "words"), [("drop", "missing: model.language_model.norm.weight"), ("reshape", "of another shape")])
def test_weights_that_do_not_fit_the_config_are_refused(tmp_path, change, words):
    saved(tmp_path)
    path = tmp_path / "model" / "model.safetensors"
    state = load_file(path)
    norm = state.pop("language_model.model.norm.weight")
    if change == "reshape":
        state["language_model.model.norm.weight"] = norm[:-1].clone()
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=words):
        locate(str(tmp_path / "model")).open_model()
