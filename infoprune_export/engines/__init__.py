"""Loadable artefacts for a target: ONNX Runtime sessions and TensorRT engines."""

from __future__ import annotations

from pathlib import Path

from infoprune_export.engines.base import Engine
from infoprune_export.recipe import TargetName


def load_engine(target: TargetName, path: Path, threads: int | None = None) -> Engine:
    """Opens one component's graph or engine file with the library that runs it.

    Args:
        target: `onnx` or `ort` for ONNX Runtime, `trt` for TensorRT.
        path: The file.
        threads: CPU threads; all cores when None.

    Raises:
        InputError: a file that cannot be used.
        MissingRequirement: the library or the device is missing.
    """
    if target == "trt":
        from infoprune_export.engines import tensorrt_run

        return tensorrt_run.load_engine(path)
    from infoprune_export.engines.onnxruntime import OrtEngine

    return OrtEngine.open(path, threads)
