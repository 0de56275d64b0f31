"""Running TensorRT engines: deserialise, move arrays to the device and back. Needs a GPU and its driver, and nothing else of CUDA."""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infoprune_export.engines import cuda
from infoprune_export.engines.base import CacheBuffers, Engine, TensorSpec
from infoprune_export.engines.cache_update import TOKENS
from infoprune_export.engines.flavours import EXTRAS, Flavour, installed
from infoprune_export.engines.kernel_cache import KernelCache
from infoprune_export.engines.profiles import CAPACITY_STEP
from infoprune_export.errors import InputError, MissingRequirement

RECORDED_AT = 2
"""Times that a run has been repeated when it is recorded; recording has its price, and many answers are short."""
FAILURES = 3
"""Recordings after which no more are tried."""
KEPT_AFTER = 100
"""Runs after which kernels are kept, for a service that is killed never ends."""
MASK_STEP = CAPACITY_STEP
"""Tokens that a mask grows by."""


def find_engine(engines: Path, component: str) -> Path:
    """The engine file of a component that fits the first GPU of this machine.

    Args:
        engines: The directory `engines/trt` of a bundle.
        component: Such as `vision_encoder`.

    Raises:
        MissingRequirement: no driver here, or no engine for this GPU and an installed flavour.
    """
    _require_driver()
    gpu = cuda.gpus()[0]
    for flavour in installed():
        file = engines / flavour.name / gpu.arch / f"{component}.engine"
        if file.is_file():
            return file
    raise MissingRequirement(
        f"there is no {component} engine for this GPU ({gpu.name}, {gpu.arch})",
        where=engines,
        mend="infoprune-export build DIR --target trt",
    )


def load_engine(path: Path) -> TensorRTEngine:
    """Loads an engine file onto the first GPU.

    Args:
        path: `.../<flavour>/<arch>/<component>.engine`.

    Raises:
        MissingRequirement: no driver, or the engine's flavour is not installed.
        InputError: a file that TensorRT does not take on this GPU.
        NotEnough: the GPU has too little memory for it.
    """
    _require_driver()
    name = path.parent.parent.name
    flavour = next((f for f in installed() if f.name == name), None)
    if flavour is None:
        raise MissingRequirement(
            f"it needs the flavour {name}, which is not installed",
            where=path,
            mend=f"pip install 'infoprune-export[{EXTRAS.get(name, 'trt')}]'",
        )
    return TensorRTEngine(path, flavour, cuda.driver())


def _require_driver() -> None:
    if not cuda.gpus():
        raise MissingRequirement("no NVIDIA driver here, and TensorRT engines run on a GPU only", mend="run this on the target")


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """An output that stayed on the device, to be fed again; its memory goes back to the engine when nobody wants it any more."""

    shape: tuple[int, ...]
    buffer: cuda.Buffer
    spare: list[cuda.Buffer]

    def __del__(self) -> None:
        self.spare.append(self.buffer)


class TensorRTEngine(Engine):
    """A deserialised engine with device memory that grows to the largest shapes seen.

    Attributes:
        updated: Outputs that are written where an input is, to that input's name: the caches of a decoder that works on them in place.
    """

    device = "cuda"

    def __init__(self, path: Path, flavour: Flavour, driver: cuda.Driver):
        self._path, trt = path, flavour.module
        driver.enter()
        self._stream = cuda.Stream(driver)
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        data = path.read_bytes()
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            if driver.free_memory() < len(data):  # TensorRT gives no reason; its weights are most of the file
                raise cuda.no_memory(path)
            raise InputError(
                f"{flavour.name} {flavour.version} does not take this engine on this GPU",
                where=path,
                mend="build it here: infoprune-export build DIR --target trt",
            )
        self._driver = driver
        # TensorRT-RTX compiles kernels, and keeps graphs of its own, for it knows when they are compiled.
        self._kernels = None if flavour.times_kernels else KernelCache(self._engine, data, flavour.version, driver)
        self._context = self._new_context(trt)
        if self._context is None:
            raise cuda.no_memory(path)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        specs = {name: self._spec(name, trt) for name in names}
        self.inputs = tuple(specs[n] for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT)
        self.outputs = tuple(specs[n] for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT)
        source_of = getattr(self._engine, "get_aliased_input_tensor", lambda name: None)  # older versions have no such outputs
        self.updated = {spec.name: source for spec in self.outputs if (source := source_of(spec.name))}
        self._buffers = {name: cuda.Buffer(driver) for name in names}
        self._spare: dict[str, list[cuda.Buffer]] = {name: [] for name in names}
        self._profile: int | None = None
        self._runs, self._failures = 0, 0
        self._last: tuple = ()
        self._repeated, self._graph = 0, None
        if self._kernels:
            weakref.finalize(self, self._kernels.keep)

    def __del__(self) -> None:
        self._graph = self._context = None  # before the kernels, which they have only borrowed

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Runs the component once; see `Engine.run`.

        Raises:
            InputError: an input is missing, or no profile of the engine covers the shapes.
        """
        return self._run(feeds, [spec.name for spec in self.outputs] if outputs is None else outputs, ())

    def run_on_device(self, feeds: Mapping[str, Any], stay: Collection[str]) -> dict[str, Any]:
        """Runs the component once; outputs in `stay` are `DeviceArray`s."""
        return self._run(feeds, [spec.name for spec in self.outputs], stay)

    def open_cache(self, batch: int, capacity: int) -> TensorRTCacheBuffers | None:
        """Room for as many tokens as the engine was built for, whatever is asked; None for an engine that joins past and present."""
        return TensorRTCacheBuffers(self, batch) if self.updated else None

    def hold(self, names: Collection[str], batch: int) -> dict[str, DeviceArray]:
        """Memory for inputs of a fixed shape, of so many rows, zeros at first.

        Raises:
            InputError: more rows than the engine was built for.
        """
        specs = [spec for spec in self.inputs if spec.name in names]
        shapes = {spec.name: (batch, *spec.shape[1:]) for spec in specs}
        self._profile_for(shapes)
        held = {spec.name: self._array(spec, shapes[spec.name]) for spec in specs}
        for array in held.values():
            array.buffer.clear(self._stream)
        return held

    def _array(self, spec: TensorSpec, shape: tuple[int, ...]) -> DeviceArray:
        spare = self._spare[spec.name]
        array = DeviceArray(shape, spare.pop() if spare else cuda.Buffer(self._driver), spare)
        array.buffer.reserve(math.prod(shape) * spec.dtype.itemsize)
        return array

    def _run(self, feeds: Mapping[str, Any], wanted: Sequence[str], stay: Collection[str]) -> dict[str, Any]:
        missing = [spec.name for spec in self.inputs if spec.name not in feeds]
        if missing:
            raise InputError(f"input {missing[0]!r} is missing", where=self._path)
        arrays = {spec.name: _contiguous(feeds[spec.name], spec.dtype) for spec in self.inputs}
        self._select_profile({name: array.shape for name, array in arrays.items()})
        places = {name: self._on_device(name, array) for name, array in arrays.items()}
        for name, array in arrays.items():
            self._context.set_input_shape(name, array.shape)
        stayed: dict[str, DeviceArray] = {}
        shapes = {spec.name: tuple(self._context.get_tensor_shape(spec.name)) for spec in self.outputs}
        for spec in self.outputs:
            if (source := self.updated.get(spec.name)) is not None:
                places[spec.name] = places[source]
                if spec.name in stay and isinstance(arrays[source], DeviceArray):
                    stayed[spec.name] = arrays[source]
            elif spec.name in stay:
                stayed[spec.name] = self._array(spec, shapes[spec.name])
                places[spec.name] = stayed[spec.name].buffer
            else:
                places[spec.name] = self._buffers[spec.name]
                places[spec.name].reserve(math.prod(shapes[spec.name]) * spec.dtype.itemsize)
        for name, buffer in places.items():
            self._context.set_tensor_address(name, buffer.address)
        state = self._profile, [a.shape for a in arrays.values()], [b.address for b in places.values()]
        self._execute(state, prompt="inputs_embeds" in arrays and arrays["inputs_embeds"].shape[1] > 1)
        asked = [spec for spec in self.outputs if spec.name in wanted and spec.name not in stayed]
        fetched = {spec.name: np.empty(shapes[spec.name], spec.dtype) for spec in asked}
        for name, array in fetched.items():
            places[name].download(array, self._stream)
        self._stream.wait()
        return {name: stayed[name] if name in stayed else fetched[name] for name in wanted}

    def _new_context(self, trt: Any) -> Any:
        """What the engine runs in; None where the device has no memory for it."""
        if self._kernels is None:
            return self._engine.create_execution_context()
        self._kernels.config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return self._engine.create_execution_context(runtime_config=self._kernels.config)

    def _execute(self, state: tuple, prompt: bool) -> None:
        """Queues a run; as one CUDA graph where it repeats the one before, as the steps of an answer and images do.

        Args:
            state: Profile, shapes and addresses.
            prompt: Steps follow, after which a graph of it were of no use.
        """
        self._repeated = self._repeated + 1 if state == self._last else 0
        if not self._repeated:
            self._last, self._graph = state, None
        if self._repeated == RECORDED_AT and not prompt and not self._kernels and self._failures < FAILURES:
            self._graph = self._stream.record(self._queue)
            self._failures += self._graph is None
        if self._graph:
            self._graph.launch(self._stream)
        elif not self._queue():
            raise InputError("TensorRT could not run it; its message is above", where=self._path)
        self._runs += 1
        if self._kernels and self._runs == KEPT_AFTER:
            self._kernels.keep()

    def _queue(self) -> bool:
        return self._context.execute_async_v3(self._stream.handle)

    def _on_device(self, name: str, array: np.ndarray | DeviceArray) -> cuda.Buffer:
        if isinstance(array, DeviceArray):
            return array.buffer
        self._buffers[name].upload(array, self._stream)
        return self._buffers[name]

    def _spec(self, name: str, trt) -> TensorSpec:
        dtype = self._engine.get_tensor_dtype(name)
        if dtype == trt.bfloat16:
            import ml_dtypes

            numpy_type = np.dtype(ml_dtypes.bfloat16)
        else:
            numpy_type = np.dtype(trt.nptype(dtype))
        return TensorSpec(name, numpy_type, tuple(None if size < 0 else size for size in self._engine.get_tensor_shape(name)))

    def _select_profile(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        index = self._profile_for(shapes)
        if index != self._profile:
            self._context.set_optimization_profile_async(index, self._stream.handle)
            self._profile = index

    def _profile_for(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The narrowest profile that covers all shapes: the last one, for decode comes after prefill."""
        for index in reversed(range(self._engine.num_optimization_profiles)):
            if all(self._covers(index, name, shape) for name, shape in shapes.items()):
                return index
        sizes = ", ".join(
            f"{name} {list(shape)}" for name, shape in shapes.items() if not name.startswith("past_key_values.") or ".0." in name
        )
        mend = "use shorter or fewer prompts and images, or make the bundle from a recipe with a larger workload"
        raise InputError(f"was not built for these shapes: {sizes}", where=self._path, mend=mend)

    def _covers(self, profile: int, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine.get_tensor_profile_shape(name, profile)
        return len(shape) == len(least) and all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))


class TensorRTCacheBuffers(CacheBuffers):
    """Each cache is input and output of every run at once, in memory of the device; its capacity is the engine's."""

    mend = "use a shorter prompt or answer, or make the bundle from a recipe with a larger workload"

    def __init__(self, engine: TensorRTEngine, batch: int):
        """
        Args:
            engine: A decoder that updates its caches in place.
            batch: Rows.
        """
        self._engine, self._arrays = engine, engine.hold(engine.updated.values(), batch)
        super().__init__(next(iter(self._arrays.values())).shape[TOKENS])

    def _run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        mask = feeds["attention_mask"]
        room = min(-mask.shape[1] % MASK_STEP, self.capacity - mask.shape[1])
        mask = np.pad(mask, ((0, 0), (0, room)))  # else every step had shapes of its own
        return self._engine.run({**feeds, "attention_mask": mask, **self._arrays}, ["logits"])["logits"]

    def _copy(self, tokens: int, capacity: int) -> None:
        return None


def _contiguous(array: Any, dtype: np.dtype) -> np.ndarray | DeviceArray:
    return array if isinstance(array, DeviceArray) else np.ascontiguousarray(array, dtype)
