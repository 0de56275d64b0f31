"""Names of what a graph computes in: its type, or its type with quantised weights.

A quantised graph has matrices of int4 or int8 and everything else, its inputs and outputs too, in a float type. Its name is the
one that Hugging Face's tools give it, as suffix of the file and as their `dtype`: `q4`, `q4f16`, `int8`, ...
"""

from __future__ import annotations

from typing import Literal

Dtype = Literal["fp32", "fp16", "bf16"]
WeightType = Literal["int8", "int4"]
Precision = Literal["fp32", "fp16", "bf16", "q4", "q4f16", "q4bf16", "int8", "int8f16", "int8bf16"]

_WEIGHTS = {"int4": "q4", "int8": "int8"}
_FLOATS = {"fp32": "", "fp16": "f16", "bf16": "bf16"}


def quantised(dtype: Dtype, weights: WeightType) -> Precision:
    """The precision of a graph of a float type with quantised weights: fp16 and int4 make `q4f16`."""
    return _WEIGHTS[weights] + _FLOATS[dtype]


def float_type(precision: Precision) -> Dtype:
    """The type of everything that is not quantised: fp16 of `q4f16`, and of fp16 itself."""
    return _PARTS[precision][0]


def weights_of(precision: Precision) -> WeightType | None:
    """The type of quantised matrices: int4 of `q4f16`, None of fp16."""
    return _PARTS[precision][1]


def is_quantised(precision: Precision) -> bool:
    return weights_of(precision) is not None


_PARTS = {dtype: (dtype, None) for dtype in _FLOATS} | {quantised(d, w): (d, w) for d in _FLOATS for w in _WEIGHTS}
