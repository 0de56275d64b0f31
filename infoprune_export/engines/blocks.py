"""Matrices as small integers with a scale for every block of inputs.

    w[i, j]  ~  scale[i // block, j] * code[i, j]         code in -8..7 (int4) or -128..127 (int8)

Rounding is to nearest and symmetric: a zero weight stays zero, and no zero points are stored, which TensorRT has not. With int8 the
largest weight of a block becomes 127, and no weight is off by more than half a scale. With 16 codes that wastes some on what is rare:
of a few smaller scales the one with the least squared error is taken. On tiny-llava at 0.33 that takes the error of the logits from
0.14 to 0.09 of the largest one.
"""

from __future__ import annotations

import numpy as np

from infoprune_export.errors import InputError
from infoprune_export.precision import WeightType

BLOCK = 32
"""Inputs that share a scale, a power of two from 16 on for ONNX Runtime. Of 32, 64 and 128, with int4 on tiny-llava at 0.6, the first
loses nothing and the others half a point or more."""
LARGEST = {"int4": 7, "int8": 127}
SHRUNK = {"int4": tuple(np.linspace(0.65, 1, 8)), "int8": (1.0,)}
"""Scales tried, as shares of the one that the largest weight fills."""
_AT_A_TIME = 2**22
"""Weights rounded together: the work takes some five times their memory."""


def quantise(matrix: np.ndarray, weights: WeightType, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a matrix.

    Args:
        matrix: [d_in, d_out], any float type; it may lie in a file and is read once.
        weights: `int4` or `int8`.
        block: Inputs that share a scale; the last block may be shorter.

    Returns:
        Codes [d_in, d_out] int8, and scales [blocks, d_out], positive, in the matrix's type.

    Raises:
        InputError: a weight is NaN or infinite.
    """
    d_in, d_out = matrix.shape
    codes = np.empty((d_in, d_out), np.int8)
    scales = np.empty((-(-d_in // block), d_out), matrix.dtype)
    step = max(1, _AT_A_TIME // (block * d_out))
    for first in range(0, len(scales), step):
        rows = slice(first * block, min((first + step) * block, d_in))
        part = np.asarray(matrix[rows], np.float32)
        blocks = np.pad(part, ((0, -len(part) % block), (0, 0))).reshape(-1, block, d_out)
        code, scales[first : first + step] = _round(blocks, weights, matrix.dtype)
        codes[rows] = code.reshape(-1, d_out)[: len(part)]
    return codes, scales


def pack(codes: np.ndarray, weights: WeightType) -> bytes:
    """Codes as ONNX stores them: a byte each, or two in a byte with the first one in its lower half."""
    if weights == "int8":
        return np.ascontiguousarray(codes).tobytes()
    flat = codes.reshape(-1).view(np.uint8) & 0xF
    pairs = np.append(flat, np.uint8(0)) if len(flat) % 2 else flat
    return (pairs[::2] | pairs[1::2] << 4).tobytes()


def _round(blocks: np.ndarray, weights: WeightType, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of blocks [n, block, d_out] float32."""
    largest, extent = LARGEST[weights], np.abs(blocks).max(1)
    if not np.isfinite(extent).all():
        raise InputError("has weights that are NaN or infinite", mend="quantise another checkpoint, or leave --weights out")
    first, *others = SHRUNK[weights]
    codes, scales = _codes(blocks, extent * (first / largest), largest, dtype)
    if not others:
        return codes, scales
    least = _error(blocks, codes, scales)
    for share in others:
        code, scale = _codes(blocks, extent * (share / largest), largest, dtype)
        error = _error(blocks, code, scale)
        better = error < least
        np.copyto(codes, code, where=better[:, None])
        np.copyto(scales, scale, where=better)
        np.copyto(least, error, where=better)
    return codes, scales


def _codes(blocks: np.ndarray, scale: np.ndarray, largest: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the scale as it is stored, rounded to its type, and that one; where it rounds to nothing, the codes are zero."""
    scale = scale.astype(dtype)
    scale[scale == 0] = 1
    return np.clip(np.rint(blocks / scale.astype(np.float32)[:, None]), -largest - 1, largest).astype(np.int8), scale


def _error(blocks: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Sum of squares [n, d_out]."""
    return np.square(codes * scales.astype(np.float32)[:, None] - blocks).sum(1)
