"""Python's garbage collector, held while TensorRT or the driver must not be called from elsewhere."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Holds the collector, which frees objects of TensorRT and of the device at any moment.

    TensorRT calls its logger, which is Python's, with a lock of its own held. A collection that begins there may free an older
    builder, whose destructor waits for that lock for ever. And memory that is freed while a stream is recorded ends the recording.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
