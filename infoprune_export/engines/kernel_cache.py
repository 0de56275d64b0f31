"""Kernels that TensorRT-RTX compiles while an engine runs, kept for the next process.

It builds engines without a GPU because it leaves kernels to the device, which compiles them whenever an engine is loaded and meets new
shapes. The file of an engine and a GPU is checked by TensorRT-RTX itself: one of another driver or version is refused, and replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from pathlib import Path
from typing import Any

from infoprune_export.engines.cuda import Driver
from infoprune_export.errors import InfoPruneError
from infoprune_export.kept import cache_directory, keep, kept

END = 2**20
"""Bytes at either end of an engine file that tell it from others; taken for another's, a cache is of no use and does no harm."""


def compiled_before(engine: Any, data: bytes, version: str, driver: Driver, owner: object) -> Any:
    """A runtime configuration under which an engine finds the kernels that earlier processes compiled, and leaves its own.

    Args:
        engine: A deserialised engine of TensorRT-RTX.
        data: What it was deserialised from.
        version: Of TensorRT-RTX.
        driver: Its context is this thread's.
        owner: With its end, or the process's, kernels are written.

    Returns:
        What `create_execution_context` takes.
    """
    config = engine.create_runtime_config()
    cache = config.create_runtime_cache()
    place = cache_directory("kernels") / f"{_name(data, version, driver)}.cache"
    known = kept(place)
    if known and not cache.deserialize(known):
        known = None
    config.set_runtime_cache(cache)
    weakref.finalize(owner, _keep, cache, place, known, driver)
    return config


def _keep(cache: Any, place: Path, known: bytes | None, driver: Driver) -> None:
    with contextlib.suppress(InfoPruneError):  # the driver may be gone before us when the process ends
        driver.enter()  # an owner may go in any thread
        compiled = cache.serialize()
        if compiled is not None and (written := bytes(memoryview(compiled))) not in (b"", known):
            keep(place, written)


def _name(data: bytes, version: str, driver: Driver) -> str:
    told = (len(data), data[:END], data[-END:], version, driver.gpus()[0].name)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]
