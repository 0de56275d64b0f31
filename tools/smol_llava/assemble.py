"""Vision tower, projector and language model become one stock `LlavaForConditionalGeneration`."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import (
    Dinov2Model,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

# Rows of the embedding: those of the tokenizer, rounded up to what matrix products like.
ROWS_MULTIPLE = 64
NEW_TOKENS = 8


def assemble(
    vision: Dinov2Model, language: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, adapter: Path
) -> LlavaForConditionalGeneration:
    """Joins the parts; `language` is changed in place.

    Args:
        vision: For images of the adapter's size.
        language: Gets the adapter's low-rank changes merged in and rows for new tokens.
        tokenizer: Knows the image token.
        adapter: The trained projector and low-rank changes, with what they were trained for in the metadata.
    """
    with safe_open(adapter, "pt") as f:
        trained_for, trained = f.metadata(), {name: f.get_tensor(name).float() for name in f.keys()}  # noqa: SIM118 (not a mapping)
    merge(language.model, trained, scale=float(trained_for["lora_alpha"]) / float(trained_for["lora_r"]))
    add_rows(language, len(tokenizer))

    for part in (vision.config, language.config):
        for name in ("_name_or_path", "dtype"):  # of the scratch folder it was read from
            vars(part).pop(name, None)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(tokenizer.image_token),
        image_seq_length=(vision.config.image_size // vision.config.patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=int(trained_for["vision_feature_layer"]),
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **ids,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = vision
    model.model.language_model = language.model
    projector = {name.removeprefix("projector."): t for name, t in trained.items() if name.startswith("projector.")}
    model.model.multi_modal_projector.load_state_dict(projector, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, **ids)
    return model.eval()


@torch.no_grad()
def merge(model: torch.nn.Module, trained: dict[str, torch.Tensor], scale: float) -> None:
    """Adds `scale * B @ A` to every matrix that `trained` has a pair `lora.<module path>.A/.B` for."""
    for name, down in trained.items():
        if name.startswith("lora.") and name.endswith(".A"):
            module = name.removeprefix("lora.").removesuffix(".A")
            model.get_submodule(module).weight += scale * (trained[f"lora.{module}.B"] @ down)


@torch.no_grad()
def add_rows(language: LlamaForCausalLM, tokens: int) -> None:
    """Gives the tied embedding a row for each of `tokens` and a few to spare; new ones are the mean of the others."""
    rows = -(-tokens // ROWS_MULTIPLE) * ROWS_MULTIPLE
    old = language.model.embed_tokens.weight
    mean = old.mean(0, keepdim=True).expand(rows - len(old), -1)
    language.model.embed_tokens = torch.nn.Embedding.from_pretrained(torch.cat([old, mean]), freeze=False)
    language.config.vocab_size = rows
