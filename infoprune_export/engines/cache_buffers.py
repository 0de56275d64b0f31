"""A decoder's cache in buffers of a fixed capacity, which ONNX Runtime reads and writes in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

from infoprune_export.engines.base import CacheBuffers

if TYPE_CHECKING:
    from infoprune_export.engines.onnxruntime import OrtEngine


class OrtCacheBuffers(CacheBuffers):
    """Each buffer is input and output of every run at once.

    Memory is touched as tokens come: room that is never needed costs addresses alone.
    """

    def __init__(self, engine: OrtEngine, batch: int, capacity: int):
        """
        Args:
            engine: A decoder that `cache_fusion` made, on the CPU.
            batch: Rows.
            capacity: Tokens.
        """
        super().__init__(capacity)
        self._engine, self._batch = engine, batch
        past = [x for x in engine.inputs if x.name.startswith("past_key_values.")]
        self._arrays = {x.name: np.zeros((batch, x.shape[1], capacity, x.shape[3]), x.dtype) for x in past}
        self._binding = engine.session.io_binding()
        for name, array in self._arrays.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)  # the array's own memory, which this object keeps alive
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), value)
        self._binding.bind_output("logits", "cpu")

    def _run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        contiguous = {name: np.ascontiguousarray(x) for name, x in feeds.items()}
        for name, array in contiguous.items():
            self._binding.bind_cpu_input(name, array)
        self._engine.run_binding(self._binding)
        return self._binding.get_outputs()[-1].numpy()

    def _copy(self, tokens: int, capacity: int) -> OrtCacheBuffers:
        new = OrtCacheBuffers(self._engine, self._batch, capacity)
        for name, array in self._arrays.items():
            new._arrays[name][:, :, :tokens] = array[:, :, :tokens]
        return new
