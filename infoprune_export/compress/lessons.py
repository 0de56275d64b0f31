"""What the original says about training rows, remembered while there is memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from torch import Tensor

from infoprune_export.memory import memory

T = TypeVar("T")


class Remembered(Generic[T]):
    """Things that are computed once for each row and do not change; those past the memory are computed again when asked for.

    Several threads may ask at a time. Everything is kept in main memory, wherever it was computed.

    Args:
        compute: Row number to thing, on the CPU.
        tensors: The tensors that a thing holds.
        limit: Bytes that may be kept; a quarter of what is free when None.
    """

    def __init__(self, compute: Callable[[int], T], tensors: Callable[[T], Iterable[Tensor]], limit: int | None = None):
        self.compute, self.tensors = compute, tensors
        self.left = memory().available // 4 if limit is None else limit
        self.kept: dict[int, T] = {}
        self.lock = threading.Lock()

    def __getitem__(self, row: int) -> T:
        if row in self.kept:
            return self.kept[row]
        thing = self.compute(row)
        size = sum(t.numel() * t.element_size() for t in self.tensors(thing))
        with self.lock:
            if row not in self.kept and size <= self.left:
                self.left -= size
                self.kept[row] = thing
        return thing
