"""Versions of the libraries that a result depends on."""

from __future__ import annotations


def library_versions() -> dict[str, str]:
    """Name to version, of those that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt-rtx-cu12-bindings", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
