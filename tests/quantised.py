"""Quantised matrices as the numbers they stand for, worked out apart from the package."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

BLOCK = 32


def dequantise(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The matrix [d_in, d_out] float32 of codes and scales."""
    return np.repeat(scales.astype(np.float32), BLOCK, axis=0)[: len(codes)] * codes.astype(np.float32)


def matrices(path: Path) -> dict[str, np.ndarray]:
    """Name to values of every matrix that a graph dequantises."""
    model = onnx.load(path)
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    return {n.output[0]: dequantise(tensors[n.input[0]], tensors[n.input[1]]) for n in nodes}


def operators(path: Path) -> Counter:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
