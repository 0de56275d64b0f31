"""What every engine offers: named arrays in, named arrays out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
