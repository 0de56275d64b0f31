"""The language model and its tokenizer, out of a 4-bit GGUF file."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

IMAGE = "<image>"


def load_language(path: Path) -> LlamaForCausalLM:
    """The model with its 4-bit weights dequantised to fp32: the values that the file holds, not those before rounding."""
    model = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    for name in ("quantization_config", "_model_name_or_path", "unk_token_id"):
        delattr(model.config, name)  # true of the file, not of the model that its weights go into
    return model


def load_tokenizer(path: Path, length: int) -> PreTrainedTokenizerFast:
    """The tokenizer with an image token after its own.

    Args:
        path: The GGUF file.
        length: Longest context.
    """
    backend = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    # transformers takes GPT-2's way of splitting; SmolLM2 ("smollm" in the file) splits numbers into digits first.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
