"""From a model directory, a packaged model or a hub id to a PyTorch model and its processor."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoprune_export.errors import InputError, NotEnough
from infoprune_export.hashes import file_sha256
from infoprune_export.memory import memory
from infoprune_export.models.families import check_family
from infoprune_export.plans import Source

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
)
"""What AutoProcessor and a runtime read beside the weights."""


@dataclass(frozen=True)
class SourceModel:
    """A checkpoint on disk that was looked at but not loaded yet."""

    directory: Path
    source: Source
    config: dict[str, Any]
    family: str

    @property
    def licence(self) -> str | None:
        """Licence stated in the front matter of the checkpoint's model card."""
        card = self.directory / "README.md"
        if not card.is_file():
            return None
        lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((x.partition(":")[2].strip() for x in lines[:30] if x.startswith(("license:", "licence:"))), None)

    def check_unchanged(self) -> None:
        """Makes sure that the files are still those that the run began with.

        Raises:
            InputError: they were changed while the run was under way.
        """
        if _hash_weights(self.directory) != self.source.sha256:
            raise InputError("was changed while this run was under way", where=self.directory, mend="run the command again")

    def open_model(self, device: torch.device | str = "cpu") -> PreTrainedModel:
        """The model laid out: in evaluation mode, its layers' weights in float32 whenever they are at hand (see `streamed`).

        Args:
            device: Where weights are used.

        Raises:
            InputError: weights that do not fit the config.
        """
        from infoprune_export.models.families import find_anatomy
        from infoprune_export.models.streamed import checkpoint_shelf, lay_out, skeleton

        try:
            model = skeleton(self.directory)
        except Exception as e:  # transformers raises anything from KeyError to ValueError here
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise InputError(f"no model can be made of its config ({reason})", where=self.directory / "config.json") from e
        anatomy = find_anatomy(model)
        return lay_out(model, checkpoint_shelf(model, weight_files(self.directory), self.directory, device), anatomy)

    def load_model(self, device: torch.device | str = "cpu") -> PreTrainedModel:
        """The model in float32 with all its weights, in evaluation mode.

        Raises:
            InputError: weights that do not fit the config.
            NotEnough: less memory than the weights in fp32 and the work on them take.
        """
        from infoprune_export.models.streamed import load_all

        self._check_memory()
        return load_all(self.open_model(device))

    @property
    def parameters(self) -> int:
        """How many there are in its files."""
        from safetensors import safe_open

        count = 0
        for path in weight_files(self.directory):
            with safe_open(path, "np") as f:
                count += sum(math.prod(f.get_slice(key).get_shape()) for key in f.keys())  # noqa: SIM118 (not a mapping)
        return count

    def _check_memory(self) -> None:
        """Stops before loading what cannot fit: original and compressed network in fp32, and room to work."""
        needed, free = 3 * 4 * self.parameters, memory().available
        if needed > free:
            raise NotEnough(
                f"needs about {needed / 2**30:.0f} GiB of memory ({self.parameters / 1e9:.1f} billion parameters in fp32, three times), "
                f"{free / 2**30:.0f} GiB are free",
                where=self.directory,
                mend="use a machine with more memory",
            )

    def load_processor(self) -> ProcessorMixin:
        from transformers import AutoProcessor

        try:
            return AutoProcessor.from_pretrained(self.directory, local_files_only=True)
        except Exception as e:
            raise InputError(f"no processor can be made of its files ({str(e).splitlines()[0]})", where=self.directory) from e


def locate(model: str, base: Path | None = None, revision: str | None = None, prepare: str | None = None) -> SourceModel:
    """Finds a checkpoint and checks all that can be checked without loading it.

    Args:
        model: `package:NAME`, a directory (relative to `base`), or a hub id `org/name`.
        base: Directory that relative paths start from; the working directory when None.
        revision: Branch, tag or commit on the hub.
        prepare: How to get the model where there is no such directory.

    Raises:
        InputError: not a model, unknown family, pickle weights, corrupt safetensors.
    """
    if model.startswith("package:"):
        directory = Path(str(resources.files("infoprune_export.models"))) / model.removeprefix("package:")
        source_id = model
    elif (candidate := (base or Path()) / model).exists():
        directory, source_id = candidate, candidate.resolve().name
    elif model.count("/") == 1 and not model.startswith((".", "/", "~")):
        directory, source_id = _download(model, revision), model
    else:
        raise InputError(
            "no such model directory",
            where=model,
            mend=prepare or "name a recipe, a recipe file, a model directory or a hub id org/name",
        )
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise InputError("is not a model directory (no config.json)", where=directory)
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"not JSON ({e})", where=config_path) from None
    if not isinstance(config, dict):
        raise InputError("not a model config", where=config_path)
    family = check_family(config, config_path)
    return SourceModel(directory, Source(id=source_id, sha256=_hash_weights(directory)), config, family)


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"]
            )
        )
    except RepositoryNotFoundError:
        raise InputError(
            "no such repository on the hub, or it is gated", where=repo, mend="check the name; set HF_TOKEN for gated models"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        raise InputError(
            f"cannot be fetched from the hub ({type(e).__name__})", where=repo, mend="check the network, or name a local model directory"
        ) from None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, as its index lists them.

    Raises:
        InputError: none, a missing shard, or pickle weights only.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError) as e:
            raise InputError(f"is not a weight index ({e})", where=index) from None
        for name in names:
            if os.path.basename(name) != name or not (directory / name).is_file():
                raise InputError(f"shard {name} is missing", where=directory, mend="fetch the checkpoint again")
        return [directory / n for n in names]
    if (single := directory / "model.safetensors").is_file():
        return [single]
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for p in directory.glob(pattern)]
    if pickles:
        raise InputError(
            f"has pickle weights only ({sorted(pickles)[0]}), which can run code when loaded",
            where=directory,
            mend="convert them to safetensors with their maker's tools: model.save_pretrained(DIR)",
        )
    raise InputError("has no weights (model.safetensors)", where=directory)


def _hash_weights(directory: Path) -> str:
    """One hash over the config and the weight files, which name the network whatever the directory is called."""
    from safetensors import SafetensorError, safe_open

    digest = hashlib.sha256()
    files = weight_files(directory)
    for path in files:
        try:
            with safe_open(path, "np") as f:
                f.keys()
        except (SafetensorError, OSError) as e:
            raise InputError(f"is not a whole safetensors file ({e})", where=path, mend="fetch the checkpoint again") from None
    for path in [directory / "config.json", *files]:
        digest.update(f"{path.name}:{file_sha256(path)}\n".encode())
    return digest.hexdigest()
