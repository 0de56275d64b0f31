"""Small random vision-language models of the families that the anatomy knows, for tests.

Imported by path through conftest: `from networks import build`.
"""

from __future__ import annotations

VISION = {
    "clip": {"model_type": "clip_vision_model"},
    "siglip": {"model_type": "siglip_vision_model"},
    "dinov2": {"model_type": "dinov2", "mlp_ratio": 2},
}
LANGUAGE = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", "head_dim": 24, "tie_word_embeddings": True},
}
IMAGE_TOKEN, IMAGE_TOKENS = 99, 16


def build(vision: str = "clip", language: str = "llama", seed: int = 0, **llava):
    """A LLaVA with random weights: vision d32 x 3 layers x 4 heads, language d48 x 3 layers x 6 heads in 3 groups.

    Weights are spread out enough for attention and norms to matter.
    """
    import torch
    from transformers import CONFIG_MAPPING, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    v = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
        **VISION[vision],
    }
    t = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": 104,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **LANGUAGE[language],
    }
    vision_config = CONFIG_MAPPING[v.pop("model_type")](**v)
    text_config = CONFIG_MAPPING[t.pop("model_type")](**t)
    strategy = "full" if vision == "siglip" else "default"
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=IMAGE_TOKEN,
        **{
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": strategy,
            "tie_word_embeddings": t.get("tie_word_embeddings", False),
            **llava,
        },
    )
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 and "norm" not in name and "layer_scale" not in name:
                p.normal_(0, 0.1)
            elif p.ndim == 2 and "embed" not in name:
                p.mul_(4)
    return model


def inputs(prompt: int = 5, batch: int = 2, seed: int = 0):
    """Random pixels and token ids for `build`'s models, the image tokens in front."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 90, (batch, prompt), generator=generator)
    ids = torch.cat([torch.full((batch, IMAGE_TOKENS), IMAGE_TOKEN), text], 1)
    pixels = torch.randn(batch, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def decoder_feeds(session, prompt: int = 7, past: int = 3):
    """Random inputs of a decoder graph, with a past, for an ONNX Runtime session."""
    import numpy as np

    rng = np.random.default_rng(0)
    feeds = {
        "attention_mask": np.ones((1, past + prompt), np.int64),
        "position_ids": np.arange(past, past + prompt, dtype=np.int64)[None],
    }
    for x in session.get_inputs():
        if x.name == "inputs_embeds":
            feeds[x.name] = rng.normal(size=(1, prompt, x.shape[2])).astype(np.float32)
        elif x.name.startswith("past_key_values."):
            feeds[x.name] = rng.normal(size=(1, x.shape[1], past, x.shape[3])).astype(np.float32)
    return feeds


def batches(samples: int = 4, images: bool = True):
    """Calibration questions for these models, each with an answer of its own; without images, of their text alone."""
    import numpy as np

    from infoprune_export.compress.calibration import Sample, make_batches

    x = inputs(batch=samples)
    pixels = x["pixel_values"].numpy()
    prompts = x["input_ids"].numpy() if images else x["input_ids"].numpy()[:, IMAGE_TOKENS:]
    return make_batches([Sample(p, np.array([5 + i, 2]), pixels[i : i + 1] if images else None) for i, p in enumerate(prompts)])
