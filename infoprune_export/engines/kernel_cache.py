"""Kernels that TensorRT-RTX compiles while an engine runs, kept for the next process.

It builds engines without a GPU because it leaves kernels to the device, which compiles them whenever an engine is loaded and meets new
shapes. The file of an engine and a GPU is checked by TensorRT-RTX itself: one of another driver or version is refused, and replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

from infoprune_export.engines.cuda import Driver
from infoprune_export.errors import InfoPruneError
from infoprune_export.kept import cache_directory, keep, kept

END = 2**20
"""Bytes at either end of an engine file that tell it from others; taken for another's, a cache is of no use and does no harm."""


class KernelCache:
    """The kernels of one engine.

    TensorRT-RTX only borrows them: this object has to outlive every context that was made with its configuration.

    Attributes:
        config: What `create_execution_context` takes as `runtime_config`.
    """

    def __init__(self, engine: Any, data: bytes, version: str, driver: Driver):
        """
        Args:
            engine: A deserialised engine of TensorRT-RTX.
            data: What it was deserialised from.
            version: Of TensorRT-RTX.
            driver: Its context is this thread's.
        """
        self.config = engine.create_runtime_config()
        self._cache = self.config.create_runtime_cache()
        self._driver = driver
        told = (len(data), data[:END], data[-END:], version, driver.gpus()[0].name)
        self._place = cache_directory("kernels") / f"{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}.cache"
        known = kept(self._place)
        self._known = known if known and self._cache.deserialize(known) else None
        self.config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Leaves what is compiled by now to the next process, where that is more than it found."""
        with contextlib.suppress(InfoPruneError):  # the driver may be gone before us when the process ends
            self._driver.enter()  # an engine may go in any thread
            compiled = self._cache.serialize()
            if compiled is not None and (written := bytes(memoryview(compiled))) not in (b"", self._known):
                keep(self._place, written)
                self._known = written
