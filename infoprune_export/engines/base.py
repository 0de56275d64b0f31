"""What every engine offers: named arrays in, named arrays out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of one input or output; a dynamic axis is None or its name."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]


class Engine(ABC):
    """One component (vision encoder, embedding, decoder) ready to run."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

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
