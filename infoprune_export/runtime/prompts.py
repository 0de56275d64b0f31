"""From a question to the model's token ids, and from its answer's ids back to text.

Ids are those of the model's own processor in transformers: the same special tokens, the same chat
template, each image token repeated once per image feature.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from infoprune_export.errors import InputError
from infoprune_export.runtime.chat import ChatTemplate
from infoprune_export.runtime.config import ModelConfig, read_json
from infoprune_export.runtime.images import ImageProcessor

FALLBACK_TEMPLATE = "USER: <image>\n{question} ASSISTANT:"
IMAGE = "<image>"
"""How a fallback template writes an image, whatever the model's own token."""


class Prompts:
    """The tokenizer of a model and the way it wants to be asked.

    Attributes:
        eos_ids: Tokens that end an answer.
        image_token: Text that stands for an image in a prompt; None for a text model.
        image_tokens: Tokens that one image takes, as far as the processor's files say.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: ModelConfig,
        *,
        template: ChatTemplate | None = None,
        fallback_template: str = FALLBACK_TEMPLATE,
        special_tokens: dict[str, str] | None = None,
        image_tokens: int | None = None,
        where: object = "prompt",
    ):
        self.tokenizer, self.config, self.template, self.fallback_template = tokenizer, config, template, fallback_template
        self.special_tokens, self.image_tokens, self.where = special_tokens or {}, image_tokens, where
        if "{question}" not in fallback_template:
            raise InputError(f"the prompt template {fallback_template!r} has no {{question}}", mend="write {question} where it goes")
        self.image_token = None if config.image_token_id is None else tokenizer.id_to_token(config.image_token_id)
        eos = tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))
        self.eos_ids = config.eos_ids or (() if eos is None else (eos,))

    @classmethod
    def from_directory(cls, directory: Path, fallback_template: str = FALLBACK_TEMPLATE) -> Prompts:
        """Reads a model directory or a bundle.

        Args:
            directory: Holds tokenizer.json and the config files around it.
            fallback_template: How to ask where the model has no chat template; `<image>` and `{question}` are filled in.

        Raises:
            InputError: a file that is missing or cannot be read.
        """
        directory = Path(directory)
        config = ModelConfig.from_directory(directory)
        settings = read_json(directory / "tokenizer_config.json")
        special = _special_tokens({**read_json(directory / "special_tokens_map.json"), **settings})
        return cls(
            _tokenizer(directory),
            config,
            template=ChatTemplate.from_directory(directory, special),
            fallback_template=fallback_template,
            special_tokens=special,
            image_tokens=_image_tokens(directory),
            where=directory,
        )

    def render(self, question: str, images: int = 0) -> str:
        """The whole prompt as text, one image token for each image.

        Args:
            question: What is asked. Images are where its image tokens are, or before it where it has none.
            images: How many there are.

        Raises:
            InputError: the question has image tokens, but not as many as there are images.
        """
        if self.template is None:
            text = self._fill_in(question, images)
        else:
            parts = self._parts(question, images)
            if not self.template.takes_parts:
                parts = [{"type": "text", "text": self._joined(parts)}]
            text = self.template.render([{"role": "user", "content": parts}])
        self._check_count(text, images)
        return text

    def encode(self, question: str, images: int = 0, image_tokens: int | None = None, raw: bool = False) -> np.ndarray:
        """Token ids of a prompt.

        Args:
            question: What is asked.
            images: How many images go with it.
            image_tokens: Tokens that one image takes; as in the processor's files when None.
            raw: `question` is the whole prompt already; only missing image tokens are put before it.

        Returns:
            [sequence] int64, image tokens repeated.

        Raises:
            InputError: the wrong number of image tokens, or more tokens than the model has positions for.
        """
        if raw:
            text = self._joined(self._parts(question, images)) if self._count(question) != images else question
        else:
            text = self.render(question, images)
        if images:
            repeat = image_tokens if image_tokens is not None else self.image_tokens
            if repeat is None:
                raise InputError("does not say how many tokens an image takes", where=self.where, mend="pass image_tokens")
            text = text.replace(self.image_token, self.image_token * repeat)
        ids = self._ids(text, with_special=raw or not self._begins_with_bos(text))
        self.config.check_length(len(ids))
        return ids

    def encode_answer(self, answer: str) -> np.ndarray:
        """Token ids [sequence] int64 of an answer as it follows a prompt, its end token included."""
        prompt, eos = self.render("?"), self.special_tokens.get("eos_token", "")
        whole = f"{prompt} {answer}{eos}"
        if self.template is not None:
            messages = [
                {"role": role, "content": [{"type": "text", "text": text}]} for role, text in (("user", "?"), ("assistant", answer))
            ]
            rendered = self.template.render(messages, add_generation_prompt=False)
            if rendered.startswith(prompt):
                end = rendered.rfind(eos) if eos else -1
                whole = rendered[: end + len(eos)] if end >= len(prompt) else rendered.rstrip() + eos
        before, ids = self._ids(prompt, False), self._ids(whole, False)
        return ids[len(before) :] if (ids[: len(before)] == before).all() else self._ids(whole[len(prompt) :], False)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, without special tokens."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def stream(self) -> TextStream:
        """Decodes token by token."""
        return TextStream(self)

    def _fill_in(self, question: str, images: int) -> str:
        """The fallback template with its images, unless the question says itself where they are."""
        template = self.fallback_template
        if images and IMAGE in template and not self._count(question):
            self._check_takes_images(images)
            return template.replace(IMAGE, "\n".join([self.image_token] * images)).replace("{question}", question.strip())
        return template.replace(f"{IMAGE}\n", "").replace(IMAGE, "").replace("{question}", self._joined(self._parts(question, images)))

    def _parts(self, question: str, images: int) -> list[dict[str, Any]]:
        """Content of a message: images where the question has image tokens, before it where it has none."""
        self._check_takes_images(images)
        if images and not self._count(question):
            return [{"type": "image"}] * images + [{"type": "text", "text": question.strip()}]
        self._check_count(question, images)
        parts: list[dict[str, Any]] = []
        for i, text in enumerate(question.split(self.image_token) if self.image_token else [question]):
            parts += [{"type": "image"}] if i else []
            parts += [{"type": "text", "text": text.strip()}] if text.strip() or not images else []
        return parts

    def _joined(self, parts: list[dict[str, Any]]) -> str:
        return "\n".join(self.image_token if p["type"] == "image" else p["text"] for p in parts)

    def _check_takes_images(self, images: int) -> None:
        if images and self.image_token is None:
            raise InputError("the model takes no images", where=self.where)

    def _count(self, text: str) -> int:
        return text.count(self.image_token) if self.image_token else 0

    def _check_count(self, text: str, images: int) -> None:
        if self._count(text) != images:
            raise InputError(
                f"the prompt has {self._count(text)} image tokens ({self.image_token}) for {images} images",
                mend="write one for each image, or none at all",
            )

    def _begins_with_bos(self, text: str) -> bool:
        return self.template is not None and bool(bos := self.special_tokens.get("bos_token")) and text.startswith(bos)

    def _ids(self, text: str, with_special: bool) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=with_special).ids, np.int64)


class TextStream:
    """Text as it becomes known: a character whose bytes are spread over several tokens waits for the last."""

    def __init__(self, prompts: Prompts):
        self._prompts, self._ids, self._said = prompts, [], ""

    def push(self, token_id: int) -> str:
        """The text that a further token adds; empty where it completes no character."""
        self._ids.append(token_id)
        text = self._prompts.decode(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new, self._said = text[len(self._said) :], text
        return new

    def finish(self) -> str:
        """What is left at the end, such as half a character."""
        return self._prompts.decode(self._ids)[len(self._said) :]


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token … as text, from a tokenizer's settings."""
    named = {k: v["content"] if isinstance(v, dict) else v for k, v in settings.items() if k.endswith("_token") and v is not None}
    return {name: token for name, token in named.items() if isinstance(token, str)}


def _tokenizer(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise InputError("has no tokenizer.json", where=directory, mend="save the model's tokenizer again with a recent transformers")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the tokenizers library raises bare Exception
        raise InputError(f"is not a tokenizer ({e})", where=path) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _image_tokens(directory: Path) -> int | None:
    """Tokens of one image as LLaVA's processor counts them: its patches, and a class token where that is kept."""
    processor, config = read_json(directory / "processor_config.json"), read_json(directory / "config.json")
    patch = processor.get("patch_size")
    if patch is None:
        return config.get("image_seq_length")
    height, width = ImageProcessor.from_directory(directory).output_size
    strategy = processor.get("vision_feature_select_strategy") or config.get("vision_feature_select_strategy")
    return (height // patch) * (width // patch) + processor.get("num_additional_image_tokens", 0) - (strategy == "default")
