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
from infoprune_export.files import file_sha256
from infoprune_export.memory import memory
from infoprune_export.models.families import check_family
from infoprune_export.models.hub import fetch, is_hub_id, known_sha256
from infoprune_export.plans import Source

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

    from infoprune_export.models.anatomy import Anatomy

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
INDEX = "model.safetensors.index.json"
FLOATS, INTEGERS = ("BF16", "F16", "F32", "F64"), ("I64", "BOOL")
"""Types of weights, and of the positions and masks that some checkpoints keep beside them."""
UNQUANTISED = "take the checkpoint that it was made from, in float16, bfloat16 or float32"


@dataclass(frozen=True)
class SourceModel:
    """A checkpoint on disk that was looked at but not loaded yet; `types` are those of its weights, as safetensors calls them."""

    directory: Path
    source: Source
    config: dict[str, Any]
    family: str
    types: tuple[str, ...] = ()

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
        from infoprune_export.models.streamed import checkpoint_shelf, lay_out

        model = self._skeleton()
        return lay_out(model, checkpoint_shelf(model, weight_files(self.directory), self.directory, device), find_anatomy(model))

    def anatomy(self) -> Anatomy:
        """What the config says where everything is; no weights are read.

        Raises:
            InputError: a config of which no model can be made, or whose parts are not found.
        """
        from infoprune_export.models.families import find_anatomy

        return find_anatomy(self._skeleton())

    def _skeleton(self) -> PreTrainedModel:
        from infoprune_export.models.streamed import skeleton

        try:
            return skeleton(self.directory)
        except Exception as e:  # transformers raises anything from KeyError to ValueError here
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise InputError(f"no model can be made of its config ({reason})", where=self.directory / "config.json") from e

    def load_model(self, device: torch.device | str = "cpu") -> PreTrainedModel:
        """The model in float32 with all its weights, in evaluation mode.

        Raises:
            InputError: weights that do not fit the config.
            NotEnough: less memory on the CPU than the weights in fp32 and the work on them take.
        """
        import torch

        from infoprune_export.models.streamed import load_all

        if torch.device(device).type == "cpu":  # a GPU gets them one by one; whether they fit there, `compress.devices` looks
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
        InputError: not a model, unknown family, pickle weights, corrupt or incomplete safetensors, quantised weights.
    """
    directory, source_id = _local(model, base)
    if directory is None:
        directory = fetch(_checked_id(model, prepare), revision)
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
    if quantisation := config.get("quantization_config"):
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise InputError(f"the weights are quantised ({method or 'quantization_config'})", where=config_path, mend=UNQUANTISED)
    types = check_tensors(directory)
    return SourceModel(directory, Source(id=source_id, sha256=_hash_weights(directory)), config, family, types)


def locate_config(model: str, base: Path | None = None, revision: str | None = None, prepare: str | None = None) -> tuple[Path, str]:
    """Finds the config of a model whose weights need not be at hand; that of some comes with the package.

    Args:
        model: See `locate`.
        base: Likewise.
        revision: Likewise.
        prepare: Likewise.

    Returns:
        The config's file, and what the model is called.

    Raises:
        InputError: nowhere to be found.
    """
    directory, source_id = _local(model, base)
    if directory is None:
        if packaged := packaged_config(model):
            return packaged, source_id
        directory = fetch(_checked_id(model, prepare), revision, ["config.json"])
    if not (path := directory / "config.json").is_file():
        raise InputError("is not a model directory (no config.json)", where=directory)
    return path, source_id


def packaged_config(model: str) -> Path | None:
    """The config that comes with the package for a hub id, or for the directory that a packaged recipe names."""
    name = model.removeprefix("./").replace("/", "--")
    path = Path(str(resources.files("infoprune_export.models"))) / "configs" / f"{name}.json"
    return path if path.is_file() else None


def _local(model: str, base: Path | None) -> tuple[Path | None, str]:
    """The directory that a model is in, None where it is not on this machine, and what the model is called."""
    if model.startswith("package:"):
        return Path(str(resources.files("infoprune_export.models"))) / model.removeprefix("package:"), model
    candidate = (base or Path()) / model
    return (candidate, candidate.resolve().name) if candidate.exists() else (None, model)


def _checked_id(model: str, prepare: str | None) -> str:
    if not is_hub_id(model):
        mend = prepare or "name a recipe, a recipe file, a model directory or a hub id org/name"
        raise InputError("no such model directory", where=model, mend=mend)
    return model


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, as its index lists them.

    Raises:
        InputError: none, a missing shard, or pickle weights only.
    """
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as e:
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


def check_tensors(directory: Path) -> tuple[str, ...]:
    """Makes sure that every tensor of a checkpoint is there, and of a type to compute with.

    Returns:
        The types of its weights as safetensors calls them, sorted.

    Raises:
        InputError: a damaged file, a tensor of the index that its shard has not, or weights of another type than a float's.
    """
    from safetensors import SafetensorError, safe_open

    types: dict[str, dict[str, str]] = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, "np") as f:
                types[path.name] = {key: f.get_slice(key).get_dtype() for key in f.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as e:
            raise InputError(f"is not a whole safetensors file ({e})", where=path, mend="fetch the checkpoint again") from None
        odd = {key: t for key, t in types[path.name].items() if t not in FLOATS and t not in INTEGERS}
        if odd:
            key, kind = next(iter(sorted(odd.items())))
            raise InputError(f"{len(odd)} tensors are quantised (the first, {key}, is {kind})", where=path, mend=UNQUANTISED)
    index = directory / INDEX
    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
    if absent := sorted(key for key, shard in named.items() if key not in types[shard]):
        what = f"names {len(absent)} tensors that their shards do not have (the first, {absent[0]}, in {named[absent[0]]})"
        raise InputError(what, where=index, mend="fetch the checkpoint again")
    return tuple(sorted({t for shard in types.values() for t in shard.values() if t in FLOATS}))


def _hash_weights(directory: Path) -> str:
    """One hash over the config and the weight files, which name the network whatever the directory is called.

    Raises:
        InputError: a file from the hub is not what the hub has.
    """
    digest = hashlib.sha256()
    for path in [directory / "config.json", *weight_files(directory)]:
        found, known = file_sha256(path), known_sha256(path)
        if known not in (None, found):
            mend = f"remove it, and it is fetched again: rm {path.resolve()}"
            raise InputError("is not the file that the hub has (sha256 differs)", where=path, mend=mend)
        digest.update(f"{path.name}:{found}\n".encode())
    return digest.hexdigest()
