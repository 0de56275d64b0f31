"""FLOPs from the anatomy, against numbers worked out by hand."""

from networks import build

from infoprune_export.models.families import find_anatomy
from infoprune_export.models.flops import count, passes
from infoprune_export.recipe import Workload


def test_llava_7b_agrees_with_the_published_shapes():
    """Totals of LLaVA-1.5-7B at 640 prompt tokens, worked out from its configuration by hand (in multiply-accumulates)."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
    )
    text = LlamaConfig(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-2))
    found = count(find_anatomy(model), Workload(image_tokens=576, text_tokens=64, new_tokens=2))
    tokens, s = 577, 640
    layer = 4 * 1024**2 * tokens + 2 * 1024 * 4096 * tokens + 2 * tokens**2 * 1024
    assert found.vision == 2 * (23 * layer + 576 * 3 * 14 * 14 * 1024)
    assert found.projector == 2 * 576 * (1024 * 4096 + 4096 * 4096)
    assert found.prefill == 2 * (32 * (s * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * s * s * 4096) + 4096 * 32064)
    assert found.decode == 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * (s + 1) * 4096) + 4096 * 32064)


def test_decode_steps_attend_to_everything_before_them():
    anatomy = find_anatomy(build())
    p = passes(anatomy, Workload(batch=2, image_tokens=16, text_tokens=4, new_tokens=4))
    assert (p["decode"].tokens, p["decode"].pairs) == (6, 2 * (21 + 22 + 23))
    assert (p["prefill"].tokens, p["prefill"].pairs) == (40, 2 * 400)
    assert (p["vision"].tokens, p["vision"].pairs) == (34, 2 * 17 * 17)


def test_one_new_token_needs_no_decoding():
    assert count(find_anatomy(build()), Workload(image_tokens=16, new_tokens=1)).decode == 0
