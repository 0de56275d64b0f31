"""Anatomy by role, for every tower and decoder that is supported."""

import pytest
from networks import LANGUAGE, VISION, build

from infoprune_export.errors import InputError
from infoprune_export.models.families import check_family, find_anatomy


@pytest.mark.parametrize("language", LANGUAGE)
@pytest.mark.parametrize("vision", VISION)
def test_every_projection_is_found_with_its_size(vision, language):
    model = build(vision, language)
    anatomy = find_anatomy(model)
    assert len(anatomy.language.layers) == 3
    for layer in anatomy.layers():
        for role in ("q", "k", "v", "o", *layer.ffn.matrices):
            linear = layer.linear(role)
            assert model.get_submodule(linear.path).weight.shape == (linear.d_out, linear.d_in)
            assert (model.get_submodule(linear.path).bias is not None) == linear.bias
    first = anatomy.language.layers[0].attention
    assert (first.heads, first.kv_groups, first.head_dim) == (6, 3, 24 if language == "gemma" else 8)
    assert (anatomy.language.layers[0].ffn.gate is None, anatomy.vision.layers[0].ffn.gate is None) == (False, True)
    assert first.q.bias == (language == "qwen2")


@pytest.mark.parametrize(("feature_layer", "used"), [(-1, 3), (-2, 2), (1, 1), ([-3, -2], 2)])
def test_layers_past_the_feature_layer_are_not_listed(feature_layer, used):
    anatomy = find_anatomy(build(vision_feature_layer=feature_layer))
    assert len(anatomy.vision.layers) == used
    assert anatomy.vision.unused_layers == 3 - used


@pytest.mark.parametrize(("vision", "tokens", "image_tokens"), [("clip", 17, 16), ("dinov2", 17, 16), ("siglip", 16, 16)])
def test_class_token_is_counted_where_there_is_one(vision, tokens, image_tokens):
    geometry = find_anatomy(build(vision)).geometry
    assert (geometry.tokens, geometry.image_tokens) == (tokens, image_tokens)


def test_unknown_family_names_the_known_ones():
    with pytest.raises(InputError, match="families known: llava"):
        check_family({"model_type": "mamba"}, "config.json")
