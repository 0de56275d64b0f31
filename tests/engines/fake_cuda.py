"""A driver and a TensorRT that work in main memory, to run what otherwise needs a GPU."""

from __future__ import annotations

import ctypes
import weakref
from types import SimpleNamespace

import numpy as np

OUT_OF_MEMORY, NOT_PERMITTED, CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 2, 800, 900, 901
STREAMS = {}
"""Handle to stream, of all drivers."""


def not_while_recording(function):
    """What the driver refuses while a stream is recorded, and the recording with it."""

    def checked(self, *arguments):
        if self.stream.recorded is None:
            return function(self, *arguments)
        self.stream.valid = False
        return CAPTURE_UNSUPPORTED

    return checked


class FakeStream:
    """Does at once what is queued, or notes it while it records."""

    def __init__(self):
        self.recorded, self.valid, self.capturable, self.recordings = None, True, True, 0

    def begin(self):
        self.recorded, self.valid = [], self.capturable
        self.recordings += 1

    def end(self):
        recorded, self.recorded = self.recorded, None
        return recorded if self.valid else None

    def queue(self, work):
        if self.recorded is None:
            work()
        else:
            self.recorded.append(work)
        return self.recorded is None or self.valid


class FakeDriver:
    """Functions of the CUDA driver over host memory: one GPU, sm89, with room for `limit` bytes."""

    def __init__(self, limit: int = 1 << 20):
        self.limit, self.blocks, self.broken, self.allocations = limit, {}, set(), 0
        self.stream, self.graphs, self.launches = FakeStream(), {}, 0

    def __getattr__(self, name: str):
        if name.startswith("cu"):
            return lambda *arguments: NOT_PERMITTED if name in self.broken else 0
        raise AttributeError(name)

    def cuGetErrorName(self, status, name):
        name._obj.value = b"CUDA_ERROR_NOT_PERMITTED"
        return 0

    def cuDeviceGetCount(self, count):
        count._obj.value = 1
        return 0

    def cuDeviceGetName(self, name, size, device):
        name.value = b"Fake GPU"
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = {75: 8, 76: 9}[attribute]
        return 0

    def cuDeviceTotalMem_v2(self, size, device):
        size._obj.value = self.limit
        return 0

    def cuDriverGetVersion(self, version):
        version._obj.value = 12080
        return 0

    @property
    def free(self):
        return self.limit - sum(map(len, self.blocks.values()))

    def cuMemGetInfo_v2(self, free, total):
        free._obj.value, total._obj.value = self.free, self.limit
        return 0

    @not_while_recording
    def cuMemAlloc_v2(self, address, size):
        if size.value > self.free:
            return OUT_OF_MEMORY
        block = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(block)
        self.blocks[address._obj.value] = block
        self.allocations += 1
        return 0

    @not_while_recording
    def cuMemFree_v2(self, address):
        del self.blocks[address.value]
        return 0

    @not_while_recording
    def cuMemsetD8Async(self, address, value, size, stream):
        ctypes.memset(address.value, value.value, size.value)
        return 0

    def cuStreamCreate(self, handle, flags):
        assert flags == 1, "the default stream must go on while this one is recorded"
        handle._obj.value = 1000 + len(STREAMS)
        STREAMS[handle._obj.value] = self.stream
        return 0

    @not_while_recording
    def cuStreamSynchronize(self, stream):
        return NOT_PERMITTED if "cuStreamSynchronize" in self.broken else 0

    def cuStreamBeginCapture_v2(self, stream, mode):
        assert mode == 1, "other threads must go on"
        STREAMS[stream.value].begin()
        return 0

    def cuStreamEndCapture(self, stream, graph):
        recorded = STREAMS[stream.value].end()
        if recorded is None:
            return CAPTURE_INVALIDATED
        graph._obj.value = self._new_graph(recorded)
        return 0

    def cuGraphInstantiateWithFlags(self, executable, graph, flags):
        executable._obj.value = self._new_graph(self.graphs[graph.value])
        return 0

    def _new_graph(self, recorded):
        handle = max(self.graphs, default=0) + 1
        self.graphs[handle] = recorded
        return handle

    def cuGraphLaunch(self, executable, stream):
        assert stream.value in STREAMS
        self.launches += 1
        for work in self.graphs[executable.value]:
            work()
        return 0

    def cuGraphDestroy(self, graph):
        del self.graphs[graph.value]
        return 0

    cuGraphExecDestroy = cuGraphDestroy

    @not_while_recording
    def cuMemcpyHtoDAsync_v2(self, target, source, size, stream):
        ctypes.memmove(target.value, source.value, size.value)
        return 0

    @not_while_recording
    def cuMemcpyDtoHAsync_v2(self, target, source, size, stream):
        ctypes.memmove(target.value, source.value, size.value)
        return 0


def _read(name, shapes, addresses):
    raw = ctypes.string_at(addresses[name], int(np.prod(shapes[name])) * 4)
    return np.frombuffer(raw, np.float32).reshape(shapes[name])


class FakeContext:
    """Runs `present = concat(past, x)`, `total = sum(present)` along the last axis."""

    def __init__(self):
        self.shapes, self.addresses, self.profiles, self.cache = {}, {}, [], None

    def set_optimization_profile_async(self, index, stream):
        self.profiles.append(index)
        return True

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, address):
        assert address, f"{name} has no address"
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name):
        batch = self.shapes["x"][0]
        return {"present": (batch, self.shapes["past"][1] + self.shapes["x"][1]), "total": (batch,)}[name]

    def execute_async_v3(self, stream):
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        return STREAMS[stream].queue(lambda: self._execute(shapes, addresses))

    def _execute(self, shapes, addresses):
        if self.cache:
            self._compile(str(shapes))
        present = np.concatenate([_read(name, shapes, addresses) for name in ("past", "x")], 1)
        ctypes.memmove(addresses["present"], present.ctypes.data, present.nbytes)
        total = present.sum(1, dtype=np.float32)
        ctypes.memmove(addresses["total"], total.ctypes.data, total.nbytes)

    def _compile(self, kernel):
        """As TensorRT-RTX does, for shapes that its cache does not know."""
        if kernel not in self.cache().kernels:
            self.cache().kernels.append(kernel)
            self.compiled.append(kernel)


GONE_TOO_EARLY = []
"""Caches that went before a context that compiles into them."""


class FakeRuntimeCache:
    """Kernels by name; takes those of its own driver only. Contexts borrow it."""

    version = "12080"

    def __init__(self):
        self.kernels, self.contexts = [], weakref.WeakSet()

    def __del__(self):
        if self.contexts:
            GONE_TOO_EARLY.append(self)

    def serialize(self):
        return "\n".join([self.version, *self.kernels]).encode()

    def deserialize(self, blob):
        version, *kernels = blob.decode().split("\n")
        self.kernels += kernels if (takes := version == self.version) else []
        return takes


class FakeRuntimeConfig:
    def create_runtime_cache(self):
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache):
        self.cache = weakref.ref(cache)
        return True


class FakeEngine:
    """Two profiles: x of 1..8 without past, and x of 1 with past 1..7; a batch of 1."""

    num_io_tensors, num_optimization_profiles = 4, 2
    names = ("x", "past", "present", "total")
    ranges = ({"x": ((1, 1), (1, 8)), "past": ((1, 0), (1, 0))}, {"x": ((1, 1), (1, 1)), "past": ((1, 1), (1, 7))})

    context_type = FakeContext

    def __init__(self):
        self.full, self.context, self.config, self.compiled = False, None, None, []

    def create_runtime_config(self):
        return FakeRuntimeConfig()

    def create_execution_context(self, runtime_config=None):
        """None on a device that is `full`; whoever asks for a context keeps it."""
        if self.full:
            return None
        context = self.context_type()
        context.compiled = self.compiled
        self.context, self.config = weakref.proxy(context), runtime_config
        if runtime_config:
            context.cache = runtime_config.cache
            context.cache().contexts.add(context)
        return context

    def get_tensor_name(self, index):
        return self.names[index]

    def get_tensor_mode(self, name):
        return "in" if name in ("x", "past") else "out"

    def get_tensor_dtype(self, name):
        return "float"

    def get_tensor_shape(self, name):
        return (-1,) if name == "total" else (-1, -1)

    def get_tensor_profile_shape(self, name, index):
        least, most = self.ranges[index][name]
        return least, most, most


class FakeUpdatingContext(FakeContext):
    """Writes x behind the tokens that are in the cache already, as many as the mask says; `logits` is the sum of all."""

    def get_tensor_shape(self, name):
        return {"present.0.key": self.shapes["past_key_values.0.key"], "logits": (1, 1, 1)}[name]

    def _execute(self, shapes, addresses):
        assert addresses["past_key_values.0.key"] == addresses["present.0.key"]
        new, mask = (_read(name, shapes, addresses).ravel() for name in ("inputs_embeds", "attention_mask"))
        tokens = int(mask.nonzero()[0].max()) + 1
        cache = (ctypes.c_float * FakeUpdatingEngine.capacity).from_address(addresses["present.0.key"])
        cache[tokens - len(new) : tokens] = new.tolist()
        total = np.float32(np.dot(cache[: len(mask)], mask))
        ctypes.memmove(addresses["logits"], total.tobytes(), 4)


class FakeUpdatingEngine(FakeEngine):
    """A decoder that updates a cache of 6 tokens in place; a batch of 1, prompts of up to 6 tokens."""

    capacity = 6
    num_io_tensors, num_optimization_profiles = 5, 1
    names = ("inputs_embeds", "attention_mask", "past_key_values.0.key", "present.0.key", "logits")
    ranges = (
        {"inputs_embeds": ((1, 1), (1, 6)), "attention_mask": ((1, 1), (1, 6)), "past_key_values.0.key": ((1, 1, 6, 1), (1, 1, 6, 1))},
    )

    context_type = FakeUpdatingContext

    def get_tensor_mode(self, name):
        return "in" if name in self.names[:3] else "out"

    def get_tensor_shape(self, name):
        return (-1, 1, 6, 1) if ".0." in name else (-1, -1)

    def get_aliased_input_tensor(self, name):
        return "past_key_values.0.key" if name == "present.0.key" else None


def fake_tensorrt(takes: bool = True, updates: bool = False) -> SimpleNamespace:
    """The module; `takes`: whether it accepts engine files, `updates`: whether they are of decoders with their cache in place."""
    engine = FakeUpdatingEngine() if updates else FakeEngine()
    return SimpleNamespace(
        __version__="9.9",
        engine=engine,
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph"),
        bfloat16="bfloat16",
        nptype=lambda dtype: np.float32,
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None}),
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda data: engine if takes else None),
    )
