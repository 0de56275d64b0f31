"""Models whose weights stay in their files: a layer's are in memory while it is worked on, and no longer.

`lay_out` builds a model without weights (its parameters are on PyTorch's `meta` device) and hangs a `Shelf` of weights on it;
`at_hand` lends a module its weights. To a model whose weights are in memory, `at_hand` does nothing, so that the same code serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from infoprune_export.errors import InputError
from infoprune_export.models.anatomy import Anatomy

META = torch.device("meta")
WORTH_MAPPING = 2 * 2**20
"""Bytes from which a tensor is used where it lies in its file; the system maps pieces of this size."""


class Shelf(Mapping[str, Tensor]):
    """Weights by the names of a model's parameters, read when looked at.

    Attributes:
        device: Where weights go when they are taken.

    Args:
        read: Parameter name to a function that gives the tensor as it is stored.
        device: Where weights go when they are taken.
    """

    def __init__(self, read: Mapping[str, Callable[[], Tensor]], device: torch.device | str = "cpu"):
        self._read, self.device = dict(read), torch.device(device)

    def __getitem__(self, name: str) -> Tensor:
        return self._read[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)

    def take(self, name: str) -> nn.Parameter:
        """A weight in float32, where it is to be used: the file's own bytes where they are that already."""
        return nn.Parameter(self[name].to(self.device, torch.float32), requires_grad=False)


def skeleton(config: Any) -> PreTrainedModel:
    """A model with parameters of the right shapes and no contents; what is computed from the config alone is there.

    Args:
        config: Its directory, or a parsed config.
    """
    if isinstance(config, Path):
        config = AutoConfig.from_pretrained(config, local_files_only=True)
    with META:
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    for name, buffer in model.named_non_persistent_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.empty_like(buffer, device="cpu"))
    model.initialize_weights()  # fills the buffers, such as frequencies of positions; without contents there is nothing else to fill
    return model.eval().requires_grad_(False)


def checkpoint_shelf(model: PreTrainedModel, files: Iterable[Path], where: object, device: torch.device | str = "cpu") -> Shelf:
    """The weights of a checkpoint, under the names that its model gives them.

    Args:
        model: From `skeleton`.
        files: Safetensors files.
        where: Named in errors.
        device: Where weights are used.

    Raises:
        InputError: weights are missing, of the wrong shape, or stored in a way that has to be converted first.
    """
    from safetensors import safe_open

    expected = model.state_dict()
    read: dict[str, Callable[[], Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    names = _Names(model, expected, where)
    for path in files:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                if (name := names.of(key)) in expected:
                    read[name] = partial(_read, path, key)
                    shapes[name] = tuple(file.get_slice(key).get_shape())
    tied = dict(getattr(model, "all_tied_weights_keys", {}))
    for alias, name in tied.items():
        if name not in read and alias in read:
            read[name], shapes[name] = read[alias], shapes[alias]
    problems = {
        "missing": [n for n in expected if n not in read and not (n in tied and tied[n] in read)],
        "of another shape": [n for n in read if shapes[n] != tuple(expected[n].shape)],
    }
    for what, wrong in problems.items():
        if wrong:
            raise InputError(f"{len(wrong)} tensors do not fit the config ({what}: {min(wrong)})", where=where)
    return Shelf({n: read[n] for n in expected if n in read and n not in tied}, device)


def _read(path: Path, key: str) -> Tensor:
    """A tensor on pages of its file that are mapped for as long as it lives: a file kept open would hold all that was ever read of it.

    Every mapping has pages with the file's header besides, which are more than a small tensor has: of those there is a copy.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensor = file.get_tensor(key)
    return tensor.clone() if tensor.nbytes < WORTH_MAPPING else tensor


class _Names:
    """How transformers renames a checkpoint's tensors for today's module tree: older LLaVA checkpoints nest their parts otherwise."""

    def __init__(self, model: PreTrainedModel, expected: Mapping[str, Tensor], where: object):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        mapping = get_model_conversion_mapping(model)
        self.model, self.expected, self.where = model, expected, where
        self.renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
        self.converters = [x for x in mapping if not isinstance(x, WeightRenaming)]

    def of(self, key: str) -> str:
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        name, converted = rename_source_key(key, self.renamings, self.converters, prefix, self.expected)
        if converted is not None:
            raise InputError(
                f"{key} has to be converted before it can be used",
                where=self.where,
                mend="load it with transformers and save it again: model.save_pretrained(DIR)",
            )
        if name not in self.expected and key in self.expected:
            return key
        return name


def file_shelf(file: Mapping[str, np.ndarray]) -> Shelf:
    """The weights of a file that is named after the model's parameters, such as a bundle's."""
    return Shelf({name: lambda name=name: torch.from_numpy(file[name]) for name in file})


def lay_out(model: PreTrainedModel, shelf: Shelf, anatomy: Anatomy) -> PreTrainedModel:
    """Gives a model without weights the small ones, and a shelf from which its layers, embedding and output head get theirs.

    Args:
        model: From `skeleton`.
        shelf: Its weights.
        anatomy: Says where they are.
    """
    model.infoprune_shelf = shelf
    lent = tuple(f"{path}." for path in lent_paths(anatomy))
    for name in shelf:
        if not name.startswith(lent):
            _put(model, name, shelf.take(name))
    model.tie_weights()
    for name, buffer in list(model.named_buffers()):  # not `model.to`: what is without weights cannot be moved
        if not buffer.is_meta:
            _put(model, name, buffer.to(shelf.device))
    return model


def load_all(model: PreTrainedModel) -> PreTrainedModel:
    """Brings all weights of a laid-out model into memory, for good."""
    shelf = model.infoprune_shelf
    for name in shelf:
        if model.get_parameter_or_buffer(name).is_meta:
            _put(model, name, shelf.take(name))
    model.tie_weights()
    del model.infoprune_shelf
    return model


def lent_paths(anatomy: Anatomy) -> list[str]:
    """Paths of the modules that a laid-out model has no weights for but while they are at hand."""
    return [*(x.path for x in anatomy.layers()), anatomy.embed_path, anatomy.head_path]


@contextmanager
def at_hand(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """Lends a module its weights; what it holds at the end, changed or not, goes.

    A module whose weights are in memory anyway keeps them, and what was changed.

    Args:
        model: Laid out, or whole.
        path: Of the module, such as a layer's.
    """
    module, shelf = model.get_submodule(path), getattr(model, "infoprune_shelf", None)
    missing = [n for n, p in module.named_parameters() if p.is_meta and f"{path}.{n}" in (shelf or ())]
    with ExitStack() as after:
        if missing:
            after.callback(lambda: _empty(model.get_submodule(path)))
            for name in missing:
                _put(module, name, shelf.take(f"{path}.{name}"))
        yield module


@contextmanager
def tables_at_hand(model: nn.Module, anatomy: Anatomy) -> Iterator[None]:
    """Lends a model its embedding and its output head, which are one table where they are tied; see `at_hand`.

    Of a large vocabulary they are several layers' worth of memory, and what runs between them needs neither.
    """
    embedding, head = model.get_submodule(anatomy.embed_path), model.get_submodule(anatomy.head_path)
    tied = head.weight is embedding.weight
    try:
        with at_hand(model, anatomy.embed_path), at_hand(model, anatomy.head_path):
            if tied:
                head.weight = embedding.weight
            yield
    finally:
        if tied:
            head.weight = embedding.weight


def _empty(module: nn.Module) -> None:
    for name, p in list(module.named_parameters()):
        _put(module, name, nn.Parameter(torch.empty_like(p, device=META), requires_grad=False))


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    holder = module.get_submodule(owner)
    if leaf in holder._buffers:
        holder._buffers[leaf] = value.data
    else:
        setattr(holder, leaf, value)
