"""One trace for every type of graph: traced in a type that stands for it, converted to the type itself.

The stand-in is float64, which nothing else in a network is computed in, so that it tells a graph's own type from the float32 that
softmax, norms and positions are computed in whatever the graph's type, and it holds constants to more digits than any type needs.
Where a network multiplies float32 by its own type, the product is of its own type, and not float32 as a half-precision network's is.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes

from infoprune_export.precision import Dtype

STAND_IN = torch.float64
ONNX_STAND_IN = ir.DataType.DOUBLE
ONNX_TYPES: dict[Dtype, ir.DataType] = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def in_type(traced: ir.Model, dtype: Dtype) -> ir.Model:
    """A copy of a graph with float64 replaced by another type, in values, constants and casts; casts that do nothing any more go.

    Args:
        traced: Without functions, float64 where the graph's own type is to be; weights may be missing.
        dtype: The graph's own type.
    """
    model, wanted = traced.clone(), ONNX_TYPES[dtype]
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.initializers.values()):
            _convert(value, wanted)
        for node in graph:
            _convert_node(node, wanted)
        for node in graph:
            if node.op_type == "Cast" and node.inputs[0].dtype == node.attributes["to"].as_int():
                node.outputs[0].replace_all_uses_with(node.inputs[0], replace_graph_outputs=True)
    passes.RemoveUnusedNodesPass()(model)
    return model


def _convert_node(node: ir.Node, wanted: ir.DataType) -> None:
    for value in node.outputs:
        _convert(value, wanted)
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.INT and name in ("to", "dtype") and attribute.value == ONNX_STAND_IN:
            node.attributes[name] = ir.AttrInt64(name, wanted)
        elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ONNX_STAND_IN:
            node.attributes[name] = ir.AttrTensor(name, _rounded(attribute.value, wanted))


def _convert(value: ir.Value, wanted: ir.DataType) -> None:
    if value.dtype == ONNX_STAND_IN:
        value.type = ir.TensorType(wanted)  # a new one: copies share theirs
        if value.const_value is not None:
            value.const_value = _rounded(value.const_value, wanted)


def _rounded(tensor: ir.TensorProtocol, wanted: ir.DataType) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.dtype(wanted.numpy())), dtype=wanted, name=tensor.name)
