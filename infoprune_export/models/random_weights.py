"""A checkpoint of a model's true shapes with random weights, to plan time and memory before the weights are at hand.

Every matrix has a power-law spectrum in random directions: `W = L diag(s) R` with L and R products of two small rotations
(Kronecker products), which costs some 250 operations a weight instead of the thousands of a dense one. So low rank is neither
exact nor useless, layers differ in how low theirs is, and heads in how much they say. Gains keep activations near one through
all layers. The same config and seed give the same bytes, whatever the number of threads.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoprune_export.errors import InputError
from infoprune_export.files import written_whole
from infoprune_export.models.families import check_family, find_anatomy
from infoprune_export.models.load import INDEX

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from infoprune_export.models.anatomy import Anatomy

VERSION = 1
"""Of how weights are made."""
SHARD_BYTES = 2 * 10**9
BLOCK = 1 << 18
"""Elements of a matrix that are computed at a time, on one core: what fits its cache goes faster than what two cores share."""
_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class RandomCheckpoint:
    """A checkpoint to be made of a config and a seed.

    Args:
        config: A config.json.
        seed: Of all weights.

    Raises:
        InputError: no known family, or not a config that transformers understands.
    """

    def __init__(self, config: Path, seed: int):
        self.model = _skeleton(config)
        self.anatomy = find_anatomy(self.model)
        self.shards = _shards(self.model)
        self.seed = seed
        self._made_from = hashlib.sha256(f"{VERSION}:{seed}:".encode() + config.read_bytes()).hexdigest()

    @property
    def tensors(self) -> int:
        return sum(map(len, self.shards))

    @property
    def bytes(self) -> int:
        return sum(t.bytes for shard in self.shards for t in shard)

    def write(self, directory: Path, progress: Callable[[int], None] = lambda n: None) -> None:
        """Writes weights, config, processor and tokenizer; whole shards of the same checkpoint that are there already stay.

        Takes memory for a part of one tensor at a time.

        Args:
            directory: Where to; what else is in it is removed.
            progress: Gets the number of tensors just done.
        """
        from infoprune_export.models.random_processor import write_processor

        if not (directory / self._made_from).is_file():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            (directory / self._made_from).touch()
        self.model.config.save_pretrained(directory)
        write_processor(self.model.config, self.anatomy.geometry, directory)
        values = _Values(self.model, self.anatomy, self.seed)
        names: dict[str, str] = {}
        for number, tensors in enumerate(self.shards, 1):
            name = f"model-{number:05}-of-{len(self.shards):05}.safetensors"
            if (directory / name).exists():
                progress(len(tensors))
            else:
                with _one_thread():
                    _write_shard(directory / name, tensors, values, progress)
            names |= {t.name: name for t in tensors}
        index = {"metadata": {"total_size": self.bytes}, "weight_map": names}
        (directory / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch on one core, so that sums come out the same whatever `--threads` says."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _skeleton(config: Path) -> PreTrainedModel:
    """The model of a config without its weights; its config keeps the type that the weights are to have."""
    from transformers import AutoConfig

    from infoprune_export.models.streamed import skeleton

    try:
        parsed = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise InputError(f"not JSON ({e})", where=config) from None
    check_family(parsed if isinstance(parsed, dict) else {}, config)
    try:
        read = AutoConfig.from_pretrained(config)
        dtype = read.dtype or read.get_text_config().dtype
        model = skeleton(read)
    except Exception as e:  # transformers raises anything from KeyError to its own validation errors here
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(f"no model can be made of it ({reason})", where=config) from None
    model.config.dtype = dtype
    return model


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint: its name, shape and type."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _shards(model: PreTrainedModel) -> list[list[Entry]]:
    """A model's parameters, tied ones once, in files of at most `SHARD_BYTES` (a larger tensor has one of its own)."""
    import torch

    own = str(model.config.dtype).removeprefix("torch.")
    dtype = getattr(torch, own if own in _TYPES else "float32")
    found: list[list[Entry]] = [[]]
    size = 0
    for name, parameter in model.named_parameters():
        entry = Entry(name, tuple(parameter.shape), dtype)
        if found[-1] and size + entry.bytes > SHARD_BYTES:
            found.append([])
            size = 0
        found[-1].append(entry)
        size += entry.bytes
    return found


def _write_shard(path: Path, tensors: list[Entry], values: _Values, progress: Callable[[int], None]) -> None:
    """A safetensors file, tensor by tensor: whole, or not there at all."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in tensors:
        name = _TYPES[str(t.dtype).removeprefix("torch.")]
        header[t.name] = {"dtype": name, "shape": t.shape, "data_offsets": [offset, offset := offset + t.bytes]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
            values.write(t, f.write)
            progress(1)


class _Values:
    """Makes the values of a model's tensors, each from the seed and its name alone."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, seed: int):
        from torch import nn

        self.seed = seed
        self.tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
        # No network answers with an image: the token's logit stays 0, which among thousands of random ones is never the largest.
        self.silent = {f"{path}.weight": model.config.image_token_id for path in (anatomy.embed_path, anatomy.head_path)}
        self.gains: dict[str, float] = {}
        self.heads: dict[str, int] = {}
        for tower in (anatomy.vision, anatomy.language):
            for layer in tower.layers:
                out = f"{layer.attention.o.path}.weight"
                self.heads[out] = layer.attention.heads
                # What a block adds to the residual stream: after all layers, about as much as was there before.
                for name in (out, f"{layer.ffn.down.path}.weight"):
                    self.gains[name] = len(tower.layers) ** -0.5

    def write(self, tensor: Entry, write: Callable[[memoryview], Any]) -> None:
        import torch

        digest = hashlib.sha256(f"{self.seed}:{tensor.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        for block in self._blocks(tensor, generator):
            write(memoryview(block.to(tensor.dtype).contiguous().view(torch.uint8).numpy()).cast("B"))

    def _blocks(self, tensor: Entry, generator: torch.Generator) -> Iterator[Tensor]:
        import torch

        name, shape = tensor.name, tensor.shape
        noise = lambda *size: torch.randn(*size, generator=generator)
        if name.endswith(".bias"):
            yield 0.02 * noise(*shape)
        elif len(shape) == 1 and name.endswith(("weight", "lambda1")):  # norms and scales
            yield 1 + 0.1 * noise(*shape)
        elif len(shape) < 2 or not name.endswith("weight"):  # class tokens and the like
            yield 0.5 * noise(*shape)
        else:
            yield from self._matrix(name, shape[0], math.prod(shape[1:]), generator)

    def _matrix(self, name: str, rows: int, columns: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Blocks of rows [rows, columns], their mean square one over the number of inputs, times the gain's; a table's is 1."""
        import torch

        rank = min(rows, columns)
        steepness = 0.4 + 0.5 * torch.rand((), generator=generator)
        spectrum = (1 + torch.arange(rank) / max(rank / 64, 4)) ** -steepness
        fan_in = 1 if name in self.tables else columns
        spectrum *= self.gains.get(name, 1.0) * math.sqrt(rows * columns / fan_in / spectrum.square().sum())
        spectrum = spectrum[torch.randperm(rank, generator=generator)]  # else it would be nearly a Kronecker product itself
        left, right = _Rotation(rows, generator), _Rotation(columns, generator)
        scale = self._head_scale(name, columns, generator)
        silent, start = self.silent.get(name, -1), 0
        for block in left.rows(rank, max(1, BLOCK // columns)):
            block = right.turn(block.mul_(spectrum)).mul_(scale)
            if start <= silent < start + len(block):
                block[silent - start] = 0
            start += len(block)
            yield block

    def _head_scale(self, name: str, columns: int, generator: torch.Generator) -> Tensor:
        """How much an output projection makes of each head, [columns]; 1 for other matrices."""
        import torch

        heads = self.heads.get(name)
        if heads is None:
            return torch.ones(())
        scale = torch.exp(0.5 * torch.randn(heads, generator=generator))
        return (scale / scale.square().mean().sqrt()).repeat_interleave(columns // heads)


class _Rotation:
    """The Kronecker product K of two small rotations, cut to [size, size] where their sizes make no such product."""

    def __init__(self, size: int, generator: torch.Generator):

        self.size, first = size, round(math.sqrt(size))
        self.outer, self.inner = (_rotation(n, generator) for n in (first, -(-size // first)))

    def rows(self, columns: int, most: int) -> Iterator[Tensor]:
        """K's first columns in blocks of about so many rows: [rows, columns]."""
        import torch

        step, outer = max(1, most // len(self.inner)), -(-columns // len(self.inner))
        left = self.size
        for start in range(0, len(self.outer), step):
            block = torch.kron(self.outer[start : start + step, :outer].contiguous(), self.inner)[:left, :columns]
            left -= len(block)
            if len(block):
                yield block.contiguous()

    def turn(self, x: Tensor) -> Tensor:
        """`x` [m, k] times K's first k rows: [m, size]."""
        import torch

        m, n = len(x), len(self.inner)
        outer = -(-x.shape[1] // n)
        x = torch.nn.functional.pad(x, (0, outer * n - x.shape[1])).view(m * outer, n) @ self.inner
        x = torch.bmm(self.outer[:outer].T.expand(m, -1, -1), x.view(m, outer, n))
        return x.view(m, -1)[:, : self.size]


def _rotation(n: int, generator: torch.Generator) -> Tensor:
    import torch

    return torch.linalg.qr(torch.randn(n, n, generator=generator))[0].contiguous()
