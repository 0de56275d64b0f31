"""What every engine offers: named arrays in, named arrays out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infoprune_export.errors import InputError


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of one input or output; a dynamic axis is None or its name."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True, eq=False)
class Step:
    """A run on `CacheBuffers`, known by its identity: the how-manieth since they were empty."""

    number: int


class CacheBuffers(ABC):
    """A decoder's keys and values of one batch, in memory that every run of the engine reads and writes in place.

    Attributes:
        capacity: Most tokens of a row, those of the prompt and of the answer together.
        mend: What to do where the tokens are too few.
    """

    mend = "give a larger capacity, or none"

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._steps: list[Step] = []

    def run(self, feeds: Mapping[str, np.ndarray], behind: Step | None) -> tuple[np.ndarray, Step]:
        """Reads tokens, and keeps their keys and values behind those of the tokens before.

        Args:
            feeds: `inputs_embeds`, `attention_mask` and `position_ids`; the mask says how many tokens there are with these.
            behind: The step that made the cache what these tokens continue; None for a prompt.

        Returns:
            Logits [batch, 1, vocab], and this step.

        Raises:
            InputError: more tokens than the capacity, or that step's tokens were overwritten since.
        """
        tokens = feeds["attention_mask"].shape[1]
        if tokens > self.capacity:
            raise InputError(f"the cache has room for {self.capacity} tokens, prompt and answer have {tokens}", mend=self.mend)
        done = 0 if behind is None else behind.number
        if behind is not None and (len(self._steps) < done or self._steps[done - 1] is not behind):
            raise InputError("another continuation of the same prompt has overwritten this cache", mend="read the prompt again")
        logits = self._run(feeds)
        self._steps[done:] = [Step(done + 1)]
        return logits, self._steps[-1]

    def larger(self, tokens: int, capacity: int) -> CacheBuffers | None:
        """Buffers of their own, of another capacity, with what these hold of so many tokens; None where the capacity is the engine's."""
        new = self._copy(tokens, capacity)
        if new is not None:
            new._steps = list(self._steps)
        return new

    @abstractmethod
    def _run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Logits; the present is written behind the past."""

    @abstractmethod
    def _copy(self, tokens: int, capacity: int) -> CacheBuffers | None:
        """See `larger`."""


class Engine(ABC):
    """One component (vision encoder, embedding, decoder) ready to run.

    Attributes:
        inputs: What `run` takes.
        outputs: What it gives.
        device: Where it runs, `cpu` or `cuda`.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    device: str

    @abstractmethod
    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Runs the component once.

        Args:
            feeds: One array for every input.
            outputs: Names wanted; all when None.

        Returns:
            Output name to array.
        """

    def run_on_device(self, feeds: Mapping[str, Any], stay: Collection[str]) -> dict[str, Any]:
        """Runs the component once and leaves some outputs where they are.

        An engine that can hold arrays of its own (on a GPU, or to spare copies) hands them out here and takes
        them back as feeds; one that cannot returns NumPy arrays all the same.

        Args:
            feeds: One array for every input, NumPy or from an earlier call.
            stay: Outputs that are only to be fed again, such as a decoder's cache.

        Returns:
            Every output name to its array; those of `stay` in a form that only this engine reads.
        """
        return self.run(feeds)

    def open_cache(self, batch: int, capacity: int) -> CacheBuffers | None:
        """Room for a decoder's cache that is written in place.

        Args:
            batch: Rows.
            capacity: Most tokens of a row; an engine that was built for a capacity gives that one.

        Returns:
            None where this engine hands out a longer copy of the cache instead, on every run.
        """
        return None
