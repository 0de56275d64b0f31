"""reference.safetensors: what the compressed network answers in PyTorch, to be read without PyTorch.

`infoprune_export.graph.reference` records it once, in fp32; every engine is later held against it. The file holds

    pixel_values        [images, channels, height, width] float32
    image_features      [first images, tokens, hidden] float32, of the first few images
    inputs_embeds       [tokens, hidden] float32, of the distinct text tokens of the first few prompts, ascending
    input_ids           all prompts end to end, int64; an image's token is repeated once per image feature
    input_offsets       [prompts + 1] int64: prompt p is input_ids[input_offsets[p]:input_offsets[p + 1]]
    images              [prompts] int64: row of pixel_values, -1 for a prompt without an image
    logits              [first prompts, vocab] float32, after the last token of the first few prompts
    generated_ids       greedy continuations end to end, int64, the end-of-sequence token included
    generated_offsets   [prompts + 1] int64

and one metadata entry, JSON, with `image_token_id`, `eos_token_ids` and `max_new_tokens`. (One entry because
safetensors writes several in no fixed order, and the file is to be the same bytes every time.)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infoprune_export.errors import InputError

METADATA_KEY = "infoprune_export.reference"
TENSORS = (
    "pixel_values",
    "image_features",
    "inputs_embeds",
    "input_ids",
    "input_offsets",
    "images",
    "logits",
    "generated_ids",
    "generated_offsets",
)


@dataclass(frozen=True)
class ReferencePrompt:
    """One prompt: token ids [sequence], image tokens already repeated, and the row of its image."""

    input_ids: np.ndarray
    image: int | None = None


@dataclass(frozen=True)
class Reference:
    """Inputs and outputs of the compressed network in PyTorch fp32.

    Attributes:
        prompts: Every prompt.
        generated: Greedy continuation of each prompt, int64 [<= max_new_tokens]; ends with the
            end-of-sequence token where one was produced.
        pixel_values: [images, channels, height, width] float32.
        image_features: [M, tokens, hidden] float32, of the first M images.
        inputs_embeds: [tokens, hidden] float32, of `text_tokens(prompts[:K], image_token_id)`.
        logits: [K, vocab] float32, after the last token of the first K prompts.
        image_token_id: Token whose embeddings are replaced by image features.
        eos_token_ids: Tokens that end a continuation.
        max_new_tokens: Length at which continuations were cut.
    """

    prompts: tuple[ReferencePrompt, ...]
    generated: tuple[np.ndarray, ...]
    pixel_values: np.ndarray
    image_features: np.ndarray
    inputs_embeds: np.ndarray
    logits: np.ndarray
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    max_new_tokens: int

    def write(self, path: Path) -> None:
        """Writes the file described at the top of this module; the same reference gives the same bytes."""
        from safetensors.numpy import save

        input_ids, input_offsets = _flatten([p.input_ids for p in self.prompts])
        generated_ids, generated_offsets = _flatten(self.generated)
        tensors = {
            "pixel_values": self.pixel_values,
            "image_features": self.image_features,
            "inputs_embeds": self.inputs_embeds,
            "input_ids": input_ids,
            "input_offsets": input_offsets,
            "images": np.array([-1 if p.image is None else p.image for p in self.prompts], np.int64),
            "logits": self.logits,
            "generated_ids": generated_ids,
            "generated_offsets": generated_offsets,
        }
        described = {
            "image_token_id": self.image_token_id,
            "eos_token_ids": list(self.eos_token_ids),
            "max_new_tokens": self.max_new_tokens,
        }
        contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        path.write_bytes(save(contiguous, metadata={METADATA_KEY: json.dumps(described)}))


def read_reference(path: Path) -> Reference:
    """Reads a recorded reference.

    Raises:
        InputError: the file is missing, damaged or not a reference.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as f:
            described = json.loads((f.metadata() or {})[METADATA_KEY])
            tensors = {name: f.get_tensor(name) for name in TENSORS}
        images = tensors["images"]
        inputs = _split(tensors["input_ids"], tensors["input_offsets"])
        return Reference(
            prompts=tuple(ReferencePrompt(ids, None if i < 0 else int(i)) for ids, i in zip(inputs, images, strict=True)),
            generated=_split(tensors["generated_ids"], tensors["generated_offsets"]),
            pixel_values=tensors["pixel_values"],
            image_features=tensors["image_features"],
            inputs_embeds=tensors["inputs_embeds"],
            logits=tensors["logits"],
            image_token_id=int(described["image_token_id"]),
            eos_token_ids=tuple(int(i) for i in described["eos_token_ids"]),
            max_new_tokens=int(described["max_new_tokens"]),
        )
    except (OSError, SafetensorError, KeyError, ValueError) as e:
        raise InputError(f"is not a readable reference ({e})", where=path, mend="make the bundle again") from None


def text_tokens(prompts: Sequence[ReferencePrompt], image_token_id: int) -> np.ndarray:
    """Distinct tokens of prompts but the image's, ascending, int64: those whose embeddings are recorded."""
    return np.setdiff1d(np.concatenate([p.input_ids for p in prompts]), [image_token_id]).astype(np.int64)


def _flatten(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *(len(r) for r in rows)], dtype=np.int64)
    return np.concatenate([np.zeros(0, np.int64), *rows]).astype(np.int64), offsets


def _split(flat: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, ...]:
    if offsets[0] != 0 or offsets[-1] != len(flat) or (np.diff(offsets) < 0).any():
        raise ValueError("offsets do not divide the token ids")
    return tuple(np.split(flat, offsets[1:-1]))
