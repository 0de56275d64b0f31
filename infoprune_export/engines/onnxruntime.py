"""ONNX Runtime: runs a graph as it is, or as it was optimised once by `build`.

A graph is untrusted until looked at: `read_graph` makes sure that its weights are whole and lie in its own
directory before ONNX Runtime, which would follow any path, opens it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from infoprune_export.engines.base import Engine, TensorSpec
from infoprune_export.engines.cache_buffers import OrtCacheBuffers
from infoprune_export.engines.cache_fusion import CAPACITY, share_cache
from infoprune_export.engines.graphs import quantised_with, read_graph
from infoprune_export.errors import InputError, MissingRequirement

EXTERNAL_FROM_BYTES = 1024
"""Initialisers from this size on go to the external file of a built graph."""

INT8_ACTIVATIONS = "4"
"""`accuracy_level` of products with quantised matrices: inputs are rounded to int8, block by block, for the integer kernels. Measured,
4096 x 4096 on AVX-512 VNNI, one token, over fp32: int4 3.8 times as fast, int8 2.8 times; in float arithmetic 1.8 and 0.04 times."""

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
Provider = str | tuple[str, dict[str, str]]
"""An execution provider's name, alone or with its options."""
_QUIET = 3
"""ONNX Runtime's log level for errors alone."""


class OrtEngine(Engine):
    """One component run by ONNX Runtime on the CPU, or on a CUDA device where its CUDA provider is installed.

    Attributes:
        path: Of the graph.
        session: ONNX Runtime's.
        device: `cpu`, or `cuda` where most of the graph runs there.
    """

    def __init__(self, session: onnxruntime.InferenceSession, path: Path):
        self.path = path
        self.session = session
        self.inputs = tuple(_spec(x, path) for x in session.get_inputs())
        self.outputs = tuple(_spec(x, path) for x in session.get_outputs())
        self._dtypes = {x.name: x.dtype for x in (*self.inputs, *self.outputs)}
        self._names = [x.name for x in self.outputs]
        self.device = "cuda" if "CUDAExecutionProvider" in session.get_providers() else "cpu"
        # Binding costs a tenth of a millisecond a run, so it is kept for what plain calls cannot do.
        self._binds = self.device != "cpu" or any(dtype.name == "bfloat16" for dtype in self._dtypes.values())

    @classmethod
    def open(cls, path: Path, threads: int | None = None, providers: Sequence[Provider] | None = None, optimise: bool = True) -> OrtEngine:
        """Opens a graph.

        Args:
            path: ONNX file, its external data beside it.
            threads: Threads within one operator; all cores when None.
            providers: ONNX Runtime's execution providers; CUDA where there is one and it can run the graph, then CPU, when None.
            optimise: Let ONNX Runtime optimise the graph for this machine while it loads.

        Raises:
            InputError: not an ONNX graph, one that ONNX Runtime cannot run, or external data that is
                missing, cut off or outside the directory.
            MissingRequirement: a bfloat16 graph without the package ml_dtypes.
        """
        model = read_graph(path)
        options = _options(threads)
        if not optimise:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return cls(_session(path, options, list(providers or _default_providers(model))), path)

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        return self._run(feeds, self._names if outputs is None else outputs, ())

    def run_on_device(self, feeds: Mapping[str, Any], stay: Collection[str]) -> dict[str, Any]:
        return self._run(feeds, self._names, stay)

    def open_cache(self, batch: int, capacity: int) -> OrtCacheBuffers | None:
        in_place = self.device == "cpu" and any(CAPACITY in x.shape for x in self.inputs)
        return OrtCacheBuffers(self, batch, capacity) if in_place else None

    def run_binding(self, binding: onnxruntime.IOBinding) -> None:
        """Runs on inputs and outputs that are bound already.

        Raises:
            InputError: ONNX Runtime cannot run the graph on them.
        """
        self._explained(self.session.run_with_iobinding, binding)

    def _run(self, feeds: Mapping[str, Any], outputs: Sequence[str], stay: Collection[str]) -> dict[str, Any]:
        return self._explained(self._run_bound if self._binds else self._run_arrays, feeds, outputs, stay)

    def _explained(self, run: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return run(*arguments)
        except Exception as e:  # ONNX Runtime's exceptions share no base of their own
            raise InputError(f"ONNX Runtime cannot run this graph on these inputs ({_reason(e)})", where=self.path) from e

    def _run_arrays(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str], stay: Collection[str]) -> dict[str, Any]:
        """On the CPU nothing has to stay: ONNX Runtime hands its own memory out as NumPy arrays."""
        return dict(zip(outputs, self.session.run(outputs, feeds), strict=True))

    def _run_bound(self, feeds: Mapping[str, Any], outputs: Sequence[str], stay: Collection[str]) -> dict[str, Any]:
        binding = self.session.io_binding()
        values = {name: self._value(array) for name, array in feeds.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, self.device if name in stay else "cpu")
        self.session.run_with_iobinding(binding)
        results = zip(outputs, binding.get_outputs(), strict=True)
        return {name: value if name in stay else _to_numpy(value, self._dtypes[name]) for name, value in results}

    def _value(self, array: Any) -> onnxruntime.OrtValue:
        """What ONNX Runtime takes for an array: itself where it comes from an earlier run."""
        if isinstance(array, onnxruntime.OrtValue):
            return array
        array = np.ascontiguousarray(array)
        if array.dtype.name == "bfloat16":
            return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), onnx.TensorProto.BFLOAT16)
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def build(graph: Path, out: Path) -> Path:
    """Writes a graph as ONNX Runtime optimises it, for any CPU.

    The level is EXTENDED: operators are fused, but memory layouts that fit only the building machine are
    left to load time. The same graph gives the same bytes. Weights go to `<out>_data`. A decoder works on its cache in place
    where it can (see `cache_fusion`).

    Args:
        graph: ONNX file.
        out: File to write; its directory is made.

    Returns:
        `out`.

    Raises:
        InputError: a graph that cannot be opened.
    """
    model = read_graph(graph)
    scale = quantised_with(model)
    share_cache(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    data = f"{out.name}_data"
    try:
        if scale in (None, onnx.TensorProto.FLOAT):
            _write_optimised(graph, part / out.name, model)
        else:
            # The CPU has no half-precision kernel: a cast comes before the scales, and the integer kernels, which want constant ones,
            # give zeros (ONNX Runtime 1.32 at this level). The second time it is folded into them.
            _write_optimised(graph, part / "cast" / out.name, model)
            _write_optimised(part / "cast" / out.name, part / out.name)
        for name in (data, out.name):  # the graph last, so that a graph never stands without its weights
            if (part / name).exists():
                os.replace(part / name, out.with_name(name))
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _write_optimised(graph: Path, out: Path, changed: onnx.ModelProto | None = None) -> None:
    """Writes a graph, or what was made of it without its weights, as ONNX Runtime optimises it."""
    out.parent.mkdir(exist_ok=True)
    options = _options(threads=1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(out)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{out.name}_data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", str(EXTERNAL_FROM_BYTES))
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
    _session(graph, options, ["CPUExecutionProvider"], changed.SerializeToString() if changed else None)


def _options(threads: int | None) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = _QUIET
    # Several sessions share the cores (three components, and the original in a comparison): threads that spin while
    # another session works take its time and make medians jump by whole scheduler slices.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", INT8_ACTIVATIONS)
    return options


def _session(
    path: Path, options: onnxruntime.SessionOptions, providers: list[Provider], changed: bytes | None = None
) -> onnxruntime.InferenceSession:
    """Opens a graph, or what was made of it without its weights."""
    try:
        return onnxruntime.InferenceSession(changed or str(path), options, providers=providers)
    except Exception as e:  # ONNX Runtime's exceptions share no base of their own
        mend = "use another --dtype: it has no such operator for this device" if "Could not find an implementation" in str(e) else None
        raise InputError(f"ONNX Runtime cannot open this graph ({_reason(e)})", where=path, mend=mend) from e


def _default_providers(model: onnx.ModelProto) -> list[Provider]:
    """CUDA where there is one, then CPU; CPU alone for a decoder that works on its cache in place.

    CUDA's GroupQueryAttention has neither fp32 nor a bias on the scores, which is how such a decoder takes its mask: half precision would
    fail there, and fp32 go back and forth between the devices in every layer, silently.
    """
    in_place = any(axis.dim_param == CAPACITY for x in model.graph.input for axis in x.type.tensor_type.shape.dim)
    if in_place or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return ["CPUExecutionProvider"]
    return [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]  # else fp32 products have half precision's ten bits


def _reason(error: Exception) -> str:
    """The last part of ONNX Runtime's `[ONNXRuntimeError] : 1 : FAIL : what happened`, on one line."""
    return " ".join(str(error).rpartition(" : ")[2].split())[:300] or type(error).__name__


def _spec(value: Any, path: Path) -> TensorSpec:
    return TensorSpec(value.name, _dtype(value.type, path), tuple(value.shape))


def _dtype(name: str, path: Path) -> np.dtype:
    if name == "tensor(bfloat16)":
        try:
            import ml_dtypes
        except ImportError:
            raise MissingRequirement("has bfloat16 inputs or outputs", where=path, mend="pip install ml_dtypes") from None
        return np.dtype(ml_dtypes.bfloat16)
    if name not in _TYPES:
        raise InputError(f"has an input or output of type {name}, which is not supported", where=path)
    return np.dtype(_TYPES[name])


def _to_numpy(value: onnxruntime.OrtValue, dtype: np.dtype) -> np.ndarray:
    if dtype.name != "bfloat16":
        return value.numpy()
    # ONNX Runtime has no NumPy type for bfloat16, so its bytes are read as what they are.
    shape = tuple(value.shape())
    raw = ctypes.string_at(value.data_ptr(), int(np.prod(shape)) * dtype.itemsize)
    return np.frombuffer(raw, dtype).reshape(shape).copy()
