"""A driver and a TensorRT that work in main memory, to run what otherwise needs a GPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np

OUT_OF_MEMORY, NOT_PERMITTED = 2, 800


class FakeDriver:
    """Functions of the CUDA driver over host memory: one GPU, sm89, with room for `limit` bytes."""

    def __init__(self, limit: int = 1 << 20):
        self.limit, self.blocks, self.broken, self.allocations = limit, {}, set(), 0

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

    def cuMemAlloc_v2(self, address, size):
        if size.value > self.free:
            return OUT_OF_MEMORY
        block = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(block)
        self.blocks[address._obj.value] = block
        self.allocations += 1
        return 0

    def cuMemFree_v2(self, address):
        del self.blocks[address.value]
        return 0

    def cuMemcpyHtoDAsync_v2(self, target, source, size, stream):
        ctypes.memmove(target.value, source.value, size.value)
        return 0

    def cuMemcpyDtoHAsync_v2(self, target, source, size, stream):
        ctypes.memmove(target.value, source.value, size.value)
        return 0


class FakeContext:
    """Runs `present = concat(past, x)`, `total = sum(present)` along the last axis."""

    def __init__(self):
        self.shapes, self.addresses, self.profiles = {}, {}, []

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
        present = np.concatenate([self._read("past"), self._read("x")], 1)
        ctypes.memmove(self.addresses["present"], present.ctypes.data, present.nbytes)
        total = present.sum(1, dtype=np.float32)
        ctypes.memmove(self.addresses["total"], total.ctypes.data, total.nbytes)
        return True

    def _read(self, name):
        shape = self.shapes[name]
        raw = ctypes.string_at(self.addresses[name], int(np.prod(shape)) * 4)
        return np.frombuffer(raw, np.float32).reshape(shape)


class FakeEngine:
    """Two profiles: x of 1..8 without past, and x of 1 with past 1..7; a batch of 1."""

    num_io_tensors, num_optimization_profiles = 4, 2
    names = ("x", "past", "present", "total")
    ranges = ({"x": ((1, 1), (1, 8)), "past": ((1, 0), (1, 0))}, {"x": ((1, 1), (1, 1)), "past": ((1, 1), (1, 7))})

    def __init__(self):
        self.context = FakeContext()

    def create_execution_context(self):
        return self.context

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
    """Writes x behind the tokens that are in the cache already; `logits` is the sum of all."""

    def get_tensor_shape(self, name):
        return {"present.0.key": self.shapes["past_key_values.0.key"], "logits": (1, 1, 1)}[name]

    def execute_async_v3(self, stream):
        assert self.addresses["past_key_values.0.key"] == self.addresses["present.0.key"]
        new, tokens = self._read("inputs_embeds").ravel(), self.shapes["attention_mask"][1]
        cache = (ctypes.c_float * FakeUpdatingEngine.capacity).from_address(self.addresses["present.0.key"])
        cache[tokens - len(new) : tokens] = new.tolist()
        total = np.float32(sum(cache[:tokens]))
        ctypes.memmove(self.addresses["logits"], total.tobytes(), 4)
        return True


class FakeUpdatingEngine(FakeEngine):
    """A decoder that updates a cache of 6 tokens in place; a batch of 1, prompts of up to 6 tokens."""

    capacity = 6
    num_io_tensors, num_optimization_profiles = 5, 1
    names = ("inputs_embeds", "attention_mask", "past_key_values.0.key", "present.0.key", "logits")
    ranges = (
        {"inputs_embeds": ((1, 1), (1, 6)), "attention_mask": ((1, 1), (1, 6)), "past_key_values.0.key": ((1, 1, 6, 1), (1, 1, 6, 1))},
    )

    def __init__(self):
        self.context = FakeUpdatingContext()

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
        bfloat16="bfloat16",
        nptype=lambda dtype: np.float32,
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None}),
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda data: engine if takes else None),
    )
