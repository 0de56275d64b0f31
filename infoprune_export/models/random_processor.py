"""Processor and tokenizer of a model of which only the config is at hand: the right sizes and ids, and words without meaning.

The files are those that transformers writes, so AutoProcessor and the runtime read them like any others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoprune_export.models.anatomy import VisionGeometry
from infoprune_export.runtime.images import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IMAGE, UNKNOWN = "<image>", "<unk>"
_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string else message['content'] -%}"
    "{%- for part in parts if part['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}"
    "{%- for part in parts if part['type'] == 'text' -%}{{ ' ' + part['text'] }}{%- endfor -%}"
    "{%- if message['role'] == 'assistant' -%}{{ 'END' }}{%- endif -%}"
    "{%- endfor -%}"
)
"""Nothing but the images, the words, and an end after an answer: a prompt has as many tokens as it is given."""


def write_processor(config: Any, geometry: VisionGeometry, directory: Path) -> None:
    """Writes tokenizer, processor and generation config beside a model's config.

    Args:
        config: Of a LLaVA-like model, as transformers reads it.
        geometry: Of its vision tower.
        directory: Where to.
    """
    special = _special_tokens(config)
    named = {f"{role}_token": token for role, token in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>")) if token in special}
    square = {"height": geometry.image_size, "width": geometry.image_size}
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": geometry.image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_convert_rgb": True,
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_processor": images,
        "image_token": IMAGE,
        "patch_size": geometry.patch_size,
        "num_additional_image_tokens": geometry.tokens - (geometry.image_size // geometry.patch_size) ** 2,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        "backend": "tokenizers",
        "image_token": IMAGE,
        "unk_token": UNKNOWN,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **named,
    }
    generation = {"do_sample": False, **{f"{role}_id": special[token] for role, token in named.items()}}
    files = {
        "preprocessor_config.json": images,
        "processor_config.json": processor,
        "tokenizer_config.json": tokenizer,
        "generation_config.json": generation,
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(_TEMPLATE.replace("END", named.get("eos_token", "")), encoding="utf-8")
    _tokenizer(config.get_text_config().vocab_size, special).save(str(directory / "tokenizer.json"))


def _special_tokens(config: Any) -> dict[str, int]:
    """Content to id, of the ids that the config names and one for unknown words."""
    text = config.get_text_config()
    special = {IMAGE: config.image_token_id}
    for role, token in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>")):
        ids = getattr(config, f"{role}_token_id", None) or getattr(text, f"{role}_token_id", None)
        number = ids[0] if isinstance(ids, (list, tuple)) else ids
        if number is not None and 0 <= number < text.vocab_size and number not in special.values():
            special[token] = number
    special[UNKNOWN] = next(i for i in range(text.vocab_size) if i not in special.values())
    return special


def _tokenizer(size: int, special: dict[str, int]) -> Tokenizer:
    """A token for every id: word `w17` for 17, where that is not a special token's."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    names = {number: token for token, number in special.items()}
    tokenizer = Tokenizer(WordLevel({names.get(i, f"w{i}"): i for i in range(size)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if "<s>" in special:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", special["<s>"])])
    return tokenizer
