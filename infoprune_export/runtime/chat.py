"""Chat templates, rendered the way transformers renders them.

A template comes with the model and is untrusted code: it runs in Jinja's immutable sandbox, with the
few functions that templates expect and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from infoprune_export.errors import InputError
from infoprune_export.runtime.config import read_json

Message = dict[str, Any]


class ChatTemplate:
    """One template and the special tokens it may name (bos_token, eos_token …)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: object = "chat template"):
        self.special_tokens, self.where = dict(special_tokens), where
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as e:
            raise InputError(f"line {e.lineno}: the chat template is not valid Jinja ({e.message})", where=where) from None

    @classmethod
    def from_directory(cls, directory: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
        """The template of a model directory, or None where it has none.

        Looked for in chat_template.jinja, chat_template.json, processor_config.json, tokenizer_config.json.
        """
        path = directory / "chat_template.jinja"
        if path.is_file():
            return cls(path.read_text(encoding="utf-8"), special_tokens, path)
        for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
            source = read_json(directory / name).get("chat_template")
            if isinstance(source, list):  # several templates by name
                source = next((x["template"] for x in source if x.get("name") == "default"), None)
            if source:
                return cls(source, special_tokens, directory / name)
        return None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of a conversation.

        Args:
            messages: Each with a role and its content, a list of `{"type": "image"}` and `{"type": "text", "text": …}`.
            add_generation_prompt: End where the assistant's answer begins.

        Raises:
            InputError: the template refuses the messages.
        """
        if not self.takes_parts:
            messages = [m | {"content": "".join(p.get("text", "") for p in m["content"])} for m in messages]
        return self._render(messages, add_generation_prompt)

    @cached_property
    def takes_parts(self) -> bool:
        """Whether content may be a list; templates of pure text models take a string and print the list as it is."""
        try:
            text = self._render([{"role": "user", "content": [{"type": "text", "text": "?"}]}], True)
        except InputError:
            return False
        return "'type'" not in text and '"type"' not in text

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **self.special_tokens)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as e:
            reason = " ".join(str(e).split()) or type(e).__name__
            raise InputError(f"the chat template refuses this conversation ({reason})", where=self.where) from None


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's tokens for training; the text is the same without it."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
