"""The little of NVIDIA's driver that running an engine takes, through ctypes: devices, memory, a stream.

The driver library comes with the driver itself, so neither PyTorch nor a CUDA toolkit has to be installed.
TensorRT works in the device's primary context, and so does this.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint64, c_void_p
from dataclasses import dataclass

import numpy as np

from infoprune_export.engines.collector import uncollected
from infoprune_export.errors import InfoPruneError, MissingRequirement, NotEnough

OUT_OF_MEMORY = 2
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: the default stream, which other libraries use, goes on while this one is recorded
THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: so do other threads


@dataclass(frozen=True)
class Gpu:
    """One device; `arch` as in sm86, memory in bytes."""

    name: str
    arch: str
    memory: int


class Driver:
    """Calls of the CUDA driver API, each checked.

    Args:
        library: The loaded driver library, or anything with its functions.
    """

    def __init__(self, library: object):
        self._library = library
        self.call("cuInit", 0)

    def call(self, function: str, *arguments: object) -> None:
        """Calls one function of the driver.

        Raises:
            NotEnough: the device has no memory left.
            MissingRequirement: any other error of the driver, by its name.
        """
        status = getattr(self._library, function)(*arguments)
        if status == OUT_OF_MEMORY:
            raise no_memory()
        if status:
            name = c_char_p()
            self._library.cuGetErrorName(status, byref(name))
            reason = name.value.decode() if name.value else f"error {status}"
            raise MissingRequirement(f"the NVIDIA driver refused {function} ({reason})", mend="check the driver with nvidia-smi")

    def gpus(self) -> list[Gpu]:
        """The devices, in the driver's order."""
        count = c_int()
        self.call("cuDeviceGetCount", byref(count))
        return [self._gpu(i) for i in range(count.value)]

    def version(self) -> str:
        """Newest CUDA version that the driver supports, such as 12.8."""
        version = c_int()
        self.call("cuDriverGetVersion", byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def free_memory(self) -> int:
        """Bytes that are free on the device whose context this thread has."""
        free, total = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    def _gpu(self, ordinal: int) -> Gpu:
        device, major, minor, memory = c_int(), c_int(), c_int(), c_size_t()
        name = ctypes.create_string_buffer(128)
        self.call("cuDeviceGet", byref(device), ordinal)
        self.call("cuDeviceGetName", name, len(name), device)
        self.call("cuDeviceGetAttribute", byref(major), MAJOR, device)
        self.call("cuDeviceGetAttribute", byref(minor), MINOR, device)
        self.call("cuDeviceTotalMem_v2", byref(memory), device)
        return Gpu(name.value.decode(), f"sm{major.value}{minor.value}", memory.value)

    def enter(self, ordinal: int = 0) -> None:
        """Makes a device's primary context this thread's, for as long as the process lives."""
        device, context = c_int(), c_void_p()
        self.call("cuDeviceGet", byref(device), ordinal)
        self.call("cuDevicePrimaryCtxRetain", byref(context), device)
        self.call("cuCtxSetCurrent", context)


def no_memory(where: object = None) -> NotEnough:
    """The error for a device that is full."""
    return NotEnough("the GPU has no memory left", where=where, mend="end other programs on it (see nvidia-smi), or use a smaller workload")


@functools.cache
def driver() -> Driver | None:
    """The driver of this machine, or None where there is none or it does not answer."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        return Driver(library)
    except (OSError, MissingRequirement):
        return None


def gpus() -> list[Gpu]:
    """GPUs of this machine; none without a driver."""
    found = driver()
    return found.gpus() if found else []


class Graph:
    """Work of a stream that was recorded, to be started as one: the device waits for the host once, not for every kernel."""

    def __init__(self, cuda: Driver, recorded: c_void_p):
        self._cuda, self._exec = cuda, c_void_p()
        try:
            cuda.call("cuGraphInstantiateWithFlags", byref(self._exec), recorded, c_uint64(0))
        finally:
            cuda.call("cuGraphDestroy", recorded)

    def launch(self, stream: Stream) -> None:
        """Queues all of it again, on the addresses and shapes that it was recorded with."""
        self._cuda.call("cuGraphLaunch", self._exec, c_void_p(stream.handle))

    def __del__(self) -> None:
        if self._exec:
            with contextlib.suppress(InfoPruneError):
                self._cuda.call("cuGraphExecDestroy", self._exec)


class Stream:
    """An ordered queue of work on the device."""

    def __init__(self, cuda: Driver):
        self._cuda, self._handle = cuda, c_void_p()
        cuda.call("cuStreamCreate", byref(self._handle), NON_BLOCKING)

    @property
    def handle(self) -> int:
        return self._handle.value or 0

    def wait(self) -> None:
        """Returns when all work queued so far is done."""
        self._cuda.call("cuStreamSynchronize", self._handle)

    def record(self, work: Callable[[], bool]) -> Graph | None:
        """What `work` would have queued, which it does not; None where it cannot be recorded.

        Args:
            work: Queues work here, and says whether it could.
        """
        recorded = c_void_p()
        try:
            with uncollected():
                self._cuda.call("cuStreamBeginCapture_v2", self._handle, THREAD_LOCAL)
                try:
                    done = work()
                finally:
                    self._cuda.call("cuStreamEndCapture", self._handle, byref(recorded))
            if done:
                return Graph(self._cuda, recorded)
            self._cuda.call("cuGraphDestroy", recorded)
        except InfoPruneError:
            pass
        return None


class Buffer:
    """Device memory that grows to what it is asked to hold and is freed with the object."""

    def __init__(self, cuda: Driver):
        self._cuda, self._size, self.address = cuda, 0, 0

    def reserve(self, size: int) -> None:
        """Makes room for at least `size` bytes; what was in it is lost when it has to grow.

        It grows by half at least, so that a cache, a token longer at every step, is not allocated anew at every step.
        """
        size = max(size, 1)  # TensorRT wants an address for empty tensors too
        if size > self._size:
            size = max(size, self._size * 3 // 2)
            self.free()
            address = c_uint64()
            self._cuda.call("cuMemAlloc_v2", byref(address), c_size_t(size))
            self._size, self.address = size, address.value

    def clear(self, stream: Stream) -> None:
        """Queues zeros for all of it."""
        self._cuda.call("cuMemsetD8Async", c_uint64(self.address), c_ubyte(0), c_size_t(self._size), c_void_p(stream.handle))

    def upload(self, array: np.ndarray, stream: Stream) -> None:
        """Queues a copy of a contiguous array to the device; it must live until `stream.wait()`."""
        self.reserve(array.nbytes)
        if array.nbytes:
            source = c_void_p(array.ctypes.data)
            self._cuda.call("cuMemcpyHtoDAsync_v2", c_uint64(self.address), source, c_size_t(array.nbytes), c_void_p(stream.handle))

    def download(self, array: np.ndarray, stream: Stream) -> None:
        """Queues a copy of the first bytes into a contiguous array, there after `stream.wait()`."""
        if array.nbytes:
            target = c_void_p(array.ctypes.data)
            self._cuda.call("cuMemcpyDtoHAsync_v2", target, c_uint64(self.address), c_size_t(array.nbytes), c_void_p(stream.handle))

    def free(self) -> None:
        if self._size:
            self._size, address = 0, self.address
            self._cuda.call("cuMemFree_v2", c_uint64(address))

    def __del__(self) -> None:
        with contextlib.suppress(InfoPruneError):  # the driver may be gone before us when the process ends
            self.free()
