"""Records what the PyTorch network answers, for devices that have no PyTorch to ask. The file: `validate.reference`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from infoprune_export.errors import InputError
from infoprune_export.validation.reference import Reference, ReferencePrompt, text_tokens


def record_reference(
    model: PreTrainedModel,
    prompts: Sequence[ReferencePrompt],
    pixel_values: np.ndarray,
    out: Path,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    features: int = 4,
    logits: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Reference:
    """Runs the stock forward of a model in fp32, greedily, and writes inputs and outputs.

    Prompts run one at a time, without padding: what a batch adds in rounding is not part of a reference.

    Args:
        model: The network that was exported, in float32, on any device.
        prompts: Token ids with image tokens repeated, and the row of `pixel_values` each looks at.
        pixel_values: [images, channels, height, width] float32, preprocessed.
        out: File to write.
        max_new_tokens: Where a continuation is cut.
        eos_token_ids: Tokens that end one.
        features: Number of images whose features are recorded.
        logits: Number of prompts whose logits, and whose text tokens' embeddings, are recorded.
        progress: Told the number of prompts done.

    Raises:
        InputError: the model is not in float32, or a prompt's image tokens do not match its image.
    """
    if model.dtype != torch.float32:
        what = f"is in {model.dtype}; a reference is recorded in float32"
        raise InputError(what, where=type(model).__name__, mend="load it with dtype float32")
    model.eval()
    pixels = torch.from_numpy(np.ascontiguousarray(pixel_values, dtype=np.float32)).to(model.device)
    generated, first_logits = [], []
    with torch.inference_mode():
        recorded = torch.stack(list(model.get_image_features(pixel_values=pixels[:features]).pooler_output)).cpu().numpy()
        tokens = torch.from_numpy(text_tokens(prompts[:logits], model.config.image_token_id)).to(model.device)
        embeds = model.get_input_embeddings()(tokens).cpu().numpy()
        for i, prompt in enumerate(prompts):
            _check(prompt, i, model.config.image_token_id, recorded.shape[1], len(pixels))
            row = None if prompt.image is None else pixels[prompt.image, None]
            ids, last = greedy(model, prompt.input_ids, row, max_new_tokens, set(eos_token_ids))
            generated.append(ids)
            if i < logits:
                first_logits.append(last)
            if progress:
                progress(i + 1)
    reference = Reference(
        prompts=tuple(prompts),
        generated=tuple(generated),
        pixel_values=pixels.cpu().numpy(),
        image_features=recorded,
        inputs_embeds=embeds,
        logits=np.stack(first_logits),
        image_token_id=int(model.config.image_token_id),
        eos_token_ids=tuple(int(i) for i in eos_token_ids),
        max_new_tokens=max_new_tokens,
    )
    reference.write(out)
    return reference


@torch.inference_mode()
def greedy(
    model: PreTrainedModel, input_ids: np.ndarray, pixel_values: torch.Tensor | None, max_new_tokens: int, eos: set[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy continuation of one prompt [n <= max_new_tokens] int64, and the logits [vocab] it starts from."""
    tokens = torch.as_tensor(np.asarray(input_ids, np.int64)).to(model.device)[None]
    step = model(input_ids=tokens, pixel_values=pixel_values, use_cache=True, logits_to_keep=1)
    first = step.logits[0, -1].cpu().numpy()
    ids: list[int] = []
    while True:
        ids.append(int(step.logits[0, -1].argmax()))
        if ids[-1] in eos or len(ids) == max_new_tokens:
            return np.array(ids, np.int64), first
        step = model(input_ids=tokens.new_tensor([[ids[-1]]]), past_key_values=step.past_key_values, use_cache=True, logits_to_keep=1)


def _check(prompt: ReferencePrompt, index: int, image_token_id: int, tokens_per_image: int, images: int) -> None:
    found = int(np.count_nonzero(np.asarray(prompt.input_ids) == image_token_id))
    wanted = 0 if prompt.image is None else tokens_per_image
    if prompt.image is not None and not 0 <= prompt.image < images:
        raise InputError(f"image {prompt.image} is not one of {images}", where=f"prompt {index}")
    if found != wanted:
        raise InputError(f"has {found} image tokens where its image takes {wanted}", where=f"prompt {index}")
