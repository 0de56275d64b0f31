"""Quantised matrices as TensorRT takes them: every block whole.

ONNX lets the last block of a matrix be shorter. TensorRT (RTX 1.7) divides the inputs by the number of scales instead: with 40 inputs
and two scales it sees two blocks of 20, not 32 and 8, and says nothing. So a matrix with a rest gets smaller blocks, each with the
scale of the one that it was part of: the same weights, with more scales. TensorRT takes blocks of 2 and more.
"""

from __future__ import annotations

from math import gcd
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from infoprune_export.engines.graphs import read_tensor


def make_whole(model: onnx.ModelProto, directory: Path) -> None:
    """Changes a graph, in place, so that blocks divide the inputs of every quantised matrix.

    Args:
        model: The graph, its weights in files. Scales that change are held in it, a small share of the matrices.
        directory: Where the weights lie.
    """
    tensors = {t.name: t for t in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        size = next((a for a in node.attribute if a.name == "block_size"), None)
        if node.op_type != "DequantizeLinear" or size is None:
            continue
        codes, scales = (tensors[name] for name in node.input)
        d_in, block = codes.dims[0], size.i
        if d_in % block == 0:
            continue
        smaller = gcd(d_in, block)
        if smaller > 1:
            wider = np.repeat(read_tensor(scales, directory), block // smaller, axis=0)[: d_in // smaller]
            scales.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(wider), scales.name))
            size.i = smaller
        else:
            nodes += _padded(model, node, codes, directory, -d_in % block)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _padded(model: onnx.ModelProto, node: onnx.NodeProto, codes: onnx.TensorProto, directory: Path, rows: int) -> list[onnx.NodeProto]:
    """Gives a matrix with an odd number of inputs rows of zeros up to a whole block; returns the node that cuts them off again."""
    d_in, d_out = codes.dims
    padded = np.pad(read_tensor(codes, directory), ((0, rows), (0, 0)))
    codes.CopyFrom(numpy_helper.from_array(padded, codes.name))
    (name,) = node.output
    node.output[0] = f"{name}_padded"
    limits = {f"{name}_start": [0, 0], f"{name}_end": [d_in, d_out]}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), k) for k, v in limits.items())
    return [helper.make_node("Slice", [node.output[0], *limits], [name], name=f"Slice_{name}")]
