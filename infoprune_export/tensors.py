"""Safetensors files that need not fit into memory: read through the file system's cache, written one tensor at a time.

The safetensors library reads lazily into PyTorch, but writes and reads NumPy arrays through memory. The format is
eight bytes of header length, a JSON header with type, shape and place of every tensor, and their bytes.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from infoprune_export.errors import InputError
from infoprune_export.files import written_whole

NAMES: dict[np.dtype, str] = {np.dtype(t): n for t, n in ((np.float64, "F64"), (np.float32, "F32"), (np.float16, "F16"), (np.int64, "I64"))}
TYPES = {name: dtype for dtype, name in NAMES.items()}
MOST_HEADER = 100 * 2**20
"""Bytes; the library's own limit."""

Shapes = Mapping[str, tuple[np.dtype, tuple[int, ...]]]
"""Name to type and shape."""


class TensorFile(Mapping[str, np.ndarray]):
    """The tensors of a file as arrays over its bytes, which the system loads as they are looked at.

    What is written into an array stays in memory; the file keeps what it holds.

    Raises:
        InputError: no whole safetensors file, or one with types other than 64, 32 and 16 bit numbers.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as f:
                size = os.fstat(f.fileno()).st_size
                length = int.from_bytes(f.read(8), "little")
                if not 0 < length <= min(MOST_HEADER, size - 8):
                    raise ValueError("its header has no sensible length")
                header = json.loads(f.read(length))
                # Never closed: it lives as long as an array looks at it.
                self._bytes = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
            header.pop("__metadata__", None)
            self._begin = 8 + length
            self._entries = {name: self._entry(name, entry, size) for name, entry in header.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"is not a whole safetensors file ({e})", where=path) from None

    def _entry(self, name: str, entry: dict, size: int) -> tuple[np.dtype, tuple[int, ...], int]:
        dtype, shape, (first, last) = TYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if last - first != dtype.itemsize * math.prod(shape) or not 0 <= first <= last <= size - self._begin:
            raise ValueError(f"{name} is not where it should be")
        return dtype, shape, self._begin + first

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape, offset = self._entries[name]
        return np.frombuffer(self._bytes, dtype, math.prod(shape), offset).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def described(tensors: Mapping[str, np.ndarray]) -> Shapes:
    """Types and shapes of arrays."""
    return {name: (t.dtype, t.shape) for name, t in tensors.items()}


def encoded(shapes: Shapes, tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[bytes | memoryview]:
    """The bytes of a file, piece by piece; the same tensors in the same order give the same bytes.

    Args:
        shapes: Of every tensor, in the order that they come in.
        tensors: Name and array of each.

    Raises:
        ValueError: a tensor is missing, out of order, or not as it was described.
    """
    header, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    yield len(head).to_bytes(8, "little") + head
    for (expected, described_as), (name, tensor) in zip(shapes.items(), tensors, strict=True):
        if (name, (tensor.dtype, tuple(tensor.shape))) != (expected, (described_as[0], tuple(described_as[1]))):
            raise ValueError(f"{name} comes where {expected} was described")
        if tensor.size:
            yield np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


def write_tensors(path: Path, shapes: Shapes, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes a file one tensor at a time; it stands at its path only when it is whole. See `encoded`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as f:
        for piece in encoded(shapes, tensors):
            f.write(piece)
