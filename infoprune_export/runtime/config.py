"""The few facts that running a model takes from its config files, which a bundle keeps beside its plan."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infoprune_export.errors import InputError


@dataclass(frozen=True)
class ModelConfig:
    """From config.json and generation_config.json.

    Attributes:
        image_token_id: Token that stands for one image feature; None for a text model.
        eos_ids: Tokens that end an answer.
        max_positions: Longest sequence, prompt and answer together; None where the config does not say.
    """

    image_token_id: int | None
    eos_ids: tuple[int, ...]
    max_positions: int | None

    @classmethod
    def from_directory(cls, directory: Path) -> ModelConfig:
        """Reads a model directory or a bundle.

        Raises:
            InputError: a file that is not JSON.
        """
        config = read_json(directory / "config.json")
        text = config.get("text_config") or {}
        image = config.get("image_token_id", config.get("image_token_index"))
        generation = read_json(directory / "generation_config.json")
        eos = next((c["eos_token_id"] for c in (generation, config, text) if c.get("eos_token_id") is not None), ())
        limit = text.get("max_position_embeddings", config.get("max_position_embeddings"))
        return cls(image, tuple(eos) if isinstance(eos, (list, tuple)) else (eos,), limit)

    def check_length(self, tokens: int) -> None:
        """Makes sure that a prompt fits the model.

        Raises:
            InputError: it has more tokens than the model has positions.
        """
        if self.max_positions is not None and tokens > self.max_positions:
            raise InputError(
                f"the prompt takes {tokens} tokens, the model has {self.max_positions} positions", mend="ask a shorter question"
            )


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file; empty where there is no such file.

    Raises:
        InputError: not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as e:
        raise InputError(f"line {e.lineno}: not JSON ({e.msg})", where=path) from None
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot be read ({e})", where=path) from None
    if not isinstance(data, dict):
        raise InputError("is not a JSON object", where=path)
    return data
