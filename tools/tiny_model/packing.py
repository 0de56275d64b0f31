"""All questions of one image in one sequence behind one shared image prefix.

A packed row is `[image][question 1 + answer 1][question 2 + answer 2]...`.
Every question sees the image and itself but no other question, and its
positions restart right after the image, so its logits are those of a sequence
of its own. The image tokens, most of every sequence, are paid for once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from tiny_data.sample import Question, Sample
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from tiny_model.architecture import IMAGE_TOKENS, MEAN, STD

# The end of an answer is easy to predict; it should not dominate the loss.
EOS_WEIGHT = 0.2
_IGNORE = -100


class Encoder:
    """Turns questions into token ids; remembers what it has seen."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.eos = tokenizer.eos_token_id
        self.pad = tokenizer.pad_token_id
        self._ids = lru_cache(maxsize=50_000)(lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))

    def prompt(self, question: str) -> tuple[int, ...]:
        """Returns the ids that follow the image."""
        return self._ids(f"\nQuestion: {question} Answer:")

    def answer(self, answer: str) -> tuple[int, ...]:
        """Returns the ids of the answer and its end."""
        return (*self._ids(f" {answer}"), self.eos)


@dataclass
class Packed:
    """A batch of packed rows; `labels[i, t]` is the token after position `t`.

    `early[i, t]` is the verdict, yes or no, of the question that position `t` is still within.
    """

    pixels: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    owners: torch.Tensor
    early: torch.Tensor
    patches: torch.Tensor

    def to(self, device: torch.device) -> Packed:
        """Returns the batch on `device`."""
        return Packed(**{name: value.to(device) for name, value in vars(self).items()})


def pixels_of(images: list[Image.Image]) -> torch.Tensor:
    """Returns what the processor makes of images that are 64x64 already."""
    stack = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images])
    stack = (stack / 255.0 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(stack.transpose(0, 3, 1, 2)))


def _row(encoder: Encoder, questions: list[Question], first_owner: int):
    ids, positions, labels, weights, owners, early = [], [], [], [], [], []
    for number, question in enumerate(questions):
        prompt, answer = encoder.prompt(question.text), encoder.answer(question.answer)
        tokens = prompt + answer[:-1]
        ids += tokens
        positions += range(IMAGE_TOKENS, IMAGE_TOKENS + len(tokens))
        labels += [_IGNORE] * (len(prompt) - 1) + list(answer)
        weights += [0.0] * (len(prompt) - 1)
        weights += [question.weight] * (len(answer) - 1) + [EOS_WEIGHT * question.weight]
        owners += [first_owner + number] * len(tokens)
        verdict = answer[0] if question.answer in ("yes", "no") else _IGNORE
        early += [verdict] * (len(prompt) - 1) + [_IGNORE] * len(answer)
    return ids, positions, labels, weights, owners, early


def pack(encoder: Encoder, samples: list[Sample]) -> Packed:
    """Packs one row per sample; questions are numbered through the batch."""
    rows, asked = [], 0
    for sample in samples:
        rows.append(_row(encoder, sample.questions, asked))
        asked += len(sample.questions)
    length = max(len(row[0]) for row in rows)

    def padded(column: int, fill: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([row[column] + [fill] * (length - len(row[column])) for row in rows], dtype=dtype)

    owners = padded(4, -1, torch.long)
    count = len(rows)
    same = owners[:, :, None] == owners[:, None, :]
    total = IMAGE_TOKENS + length
    mask = torch.zeros(count, total, total, dtype=torch.bool)
    mask[:, :, :IMAGE_TOKENS] = True
    mask[:, IMAGE_TOKENS:, IMAGE_TOKENS:] = same
    mask &= torch.ones(total, total, dtype=torch.bool).tril()
    image_positions = torch.arange(IMAGE_TOKENS).expand(count, -1)
    return Packed(
        pixels=pixels_of([sample.image for sample in samples]),
        ids=padded(0, encoder.pad, torch.long),
        positions=torch.cat([image_positions, padded(1, IMAGE_TOKENS, torch.long)], 1),
        mask=mask[:, None],
        labels=padded(2, _IGNORE, torch.long),
        weights=padded(3, 0.0, torch.float),
        owners=owners,
        early=padded(5, _IGNORE, torch.long),
        patches=torch.from_numpy(np.stack([sample.patches for sample in samples])),
    )


def vision_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Returns the last layer's patch features, as `LlavaModel` selects them."""
    return model.model.vision_tower(pixels).last_hidden_state[:, 1:]


def text_states(model: LlavaForConditionalGeneration, batch: Packed, features: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the language model's last states at the text positions."""
    if features is None:
        features = vision_features(model, batch.pixels)
    prefix = model.model.multi_modal_projector(features)
    words = model.model.language_model.embed_tokens(batch.ids)
    return model.model.language_model(
        inputs_embeds=torch.cat([prefix, words], 1),
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state[:, IMAGE_TOKENS:]


def answer_logits(
    model: LlavaForConditionalGeneration, batch: Packed, states: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the logits at all answer positions, and the mask of these positions."""
    states = text_states(model, batch) if states is None else states
    wanted = batch.labels != _IGNORE
    return model.lm_head(states[wanted]), wanted


def verdict_loss(model: LlavaForConditionalGeneration, batch: Packed, states: torch.Tensor) -> torch.Tensor | None:
    """Returns the loss of telling yes from no at every word of a yes-no question.

    Whether something in the image matches the word just read is easier to learn
    at that word than through the answer at the end, where training otherwise
    stays at one half for thousands of steps. No other loss is on these positions.
    """
    asked = batch.early != _IGNORE
    if not asked.any():
        return None
    logits = model.lm_head(states[asked]).float()
    return nn.functional.cross_entropy(logits, batch.early[asked])


def answer_loss(logits: torch.Tensor, wanted: torch.Tensor, batch: Packed) -> torch.Tensor:
    """Returns the weighted mean cross-entropy of answers and their ends."""
    loss = nn.functional.cross_entropy(logits.float(), batch.labels[wanted], reduction="none")
    weights = batch.weights[wanted]
    return (loss * weights).sum() / weights.sum()


def correct(logits: torch.Tensor, wanted: torch.Tensor, batch: Packed) -> torch.Tensor:
    """Returns per question whether greedy decoding gives exactly the answer.

    If the argmax is right at every answer position given the right prefix, then
    greedy decoding produces that very answer, and the other way round.
    """
    right = logits.argmax(-1) == batch.labels[wanted]
    owners = batch.owners[wanted]
    result = torch.ones(int(owners.max()) + 1, dtype=torch.bool, device=right.device)
    result[owners[~right]] = False
    return result
