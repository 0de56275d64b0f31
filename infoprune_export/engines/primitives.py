"""Operators that an older TensorRT does not read, written out in ones that it does.

TensorRT's parser reads Attention from 10.14 on, RMSNormalization and RotaryEmbedding from 10.15, all of opset 23; JetPack 6 has 10.3. They
are written out in the forms that `graph.components` gives them. Any other form stays, for the parser to name.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper

OPSET = 21
"""Has all else that graphs here hold, block-wise DequantizeLinear the latest."""


def write_out(model: onnx.ModelProto, reads: Callable[[str], bool]) -> set[str]:
    """Writes out the operators of a graph that a parser does not read.

    Args:
        model: Changed, and of opset 21 where no operator is left that has come since.
        reads: Whether the parser reads an operator.

    Returns:
        The operators that were written out.
    """
    unread = {op for op in _FORMS if not reads(op)}.intersection(n.op_type for n in model.graph.node)
    if not unread:
        return set()
    types = _types(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        form = _Form(node, types, model.graph) if node.op_type in unread else None
        if form is not None and _FORMS[node.op_type](form):
            nodes += form.nodes
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    left = {n.op_type for n in nodes}
    if all(onnx.defs.has(op, OPSET, "") for op in left):
        next(x for x in model.opset_import if not x.domain).version = OPSET
    return unread - left


class _Form:
    """Nodes in the place of one."""

    def __init__(self, node: onnx.NodeProto, types: dict[str, onnx.TypeProto.Tensor], graph: onnx.GraphProto):
        self.node, self.nodes = node, []
        self.inputs, self.output = list(node.input), node.output[0]
        self.attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self._types, self._graph = types, graph

    def type(self, place: int = 0) -> int:
        """Element type of an input; 0 where it is not known."""
        return self._types.get(self.inputs[place], _UNKNOWN).elem_type

    def sizes(self, place: int, rank: int) -> list[int]:
        """Sizes of an input, 0 where they are dynamic or not known; all 0 for one that has another rank."""
        dims = self._types.get(self.inputs[place], _UNKNOWN).shape.dim
        return [d.dim_value for d in dims] if len(dims) == rank else [0] * rank

    def has_only(self, **usual: object) -> bool:
        """Whether attributes other than those named are not there, and those named have their values where they are."""
        return all(usual.get(name, value) == value and name in usual for name, value in self.attributes.items())

    def add(self, operator: str, *inputs: str, out: str | None = None, **attributes: object) -> str:
        """Appends a node; returns its output."""
        name = f"{self.output}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [out or name], f"{operator}_{out or name}", **attributes))
        return self.nodes[-1].output[0]

    def split(self, x: str) -> tuple[str, str]:
        """Halves of the last axis."""
        halves = f"{self.output}.first", f"{self.output}.second"
        self.nodes.append(helper.make_node("Split", [x], halves, f"Split_{halves[0]}", axis=-1, num_outputs=2))
        return halves

    def scalar(self, value: float, element: int) -> str:
        return self._keep(helper.make_tensor("", element, [], [value]))

    def integers(self, *values: int) -> str:
        return self._keep(helper.make_tensor("", TensorProto.INT64, [len(values)], values))

    def _keep(self, tensor: onnx.TensorProto) -> str:
        tensor.name = f"{self.output}.constant{len(self._graph.initializer)}"
        self._graph.initializer.append(tensor)
        return tensor.name


def _rms_normalization(form: _Form) -> bool:
    """In float32, and only then in the graph's type."""
    if not form.has_only(axis=-1, epsilon=form.attributes.get("epsilon"), stash_type=1) or not form.type():
        return False
    x, scale = form.inputs
    x = form.add("Cast", x, to=TensorProto.FLOAT)
    squares = form.add("ReduceMean", form.add("Mul", x, x), form.integers(-1))
    root = form.add("Sqrt", form.add("Add", squares, form.scalar(form.attributes.get("epsilon", 1e-5), TensorProto.FLOAT)))
    form.add("Mul", form.add("Cast", form.add("Div", x, root), to=form.type()), scale, out=form.output)
    return True


def _rotary_embedding(form: _Form) -> bool:
    """Halves rotated: x [batch, heads, sequence, width], cosines and sines [batch, sequence, width / 2]."""
    if not form.has_only(interleaved=0, num_heads=0, rotary_embedding_dim=0) or len(form.inputs) != 3:
        return False
    cos, sin = (form.add("Unsqueeze", x, form.integers(1)) for x in form.inputs[1:])
    one, two = form.split(form.inputs[0])
    real = form.add("Sub", form.add("Mul", one, cos), form.add("Mul", two, sin))
    imaginary = form.add("Add", form.add("Mul", one, sin), form.add("Mul", two, cos))
    form.add("Concat", real, imaginary, out=form.output, axis=-1)
    return True


def _attention(form: _Form) -> bool:
    """Queries [batch, heads, sequence, width], keys and values [batch, groups, tokens, width], mask [batch, 1, sequence, tokens] bool."""
    usual = form.has_only(scale=form.attributes.get("scale"), is_causal=0, TRT_decomposable=1)
    if not usual or not 3 <= len(form.inputs) <= 4 or len(form.node.output) > 1:
        return False
    (_, heads, _, width), (_, groups, _, _), (_, _, _, out_width) = (form.sizes(place, 4) for place in range(3))
    masked = len(form.inputs) == 4
    element = form.type()
    unknown = not (heads and groups and width and out_width) or element not in _LOWEST
    if unknown or (masked and (form.type(3) != TensorProto.BOOL or form.sizes(3, 4)[1] != 1)):
        return False
    queries, keys, values, *mask = form.inputs
    root = form.scalar(math.sqrt(form.attributes.get("scale", width**-0.5)), element)
    queries = form.add("Mul", queries, root)  # half of the scale on either side, so that products stay small in half precision
    keys = form.add("Transpose", form.add("Mul", keys, root), perm=[0, 1, 3, 2])
    if grouped := heads != groups:  # an axis of its own for the heads of a group
        queries = form.add("Reshape", queries, form.integers(0, groups, heads // groups, -1, width))
        keys, values = (form.add("Unsqueeze", x, form.integers(2)) for x in (keys, values))
        mask = [form.add("Unsqueeze", m, form.integers(1)) for m in mask]
    scores = form.add("MatMul", queries, keys)
    for m in mask:
        scores = form.add("Where", m, scores, form.scalar(_LOWEST[element], element))
    shares = form.add("Softmax", scores, axis=-1)
    if grouped:
        form.add("Reshape", form.add("MatMul", shares, values), form.integers(0, heads, -1, out_width), out=form.output)
    else:
        form.add("MatMul", shares, values, out=form.output)
    return True


def _gelu(form: _Form) -> bool:
    """x / 2 (1 + erf(x / sqrt 2)), or with its approximation by tanh."""
    (x,), element = form.inputs, form.type()
    if not element:
        return False
    number = lambda value: form.scalar(value, element)
    if form.attributes.get("approximate", b"none") == b"tanh":
        cube = form.add("Mul", form.add("Mul", x, x), form.add("Mul", x, number(0.044715)))
        bent = form.add("Tanh", form.add("Mul", form.add("Add", x, cube), number(math.sqrt(2 / math.pi))))
    else:
        bent = form.add("Erf", form.add("Mul", x, number(math.sqrt(0.5))))
    half = form.add("Mul", x, number(0.5))
    form.add("Mul", half, form.add("Add", bent, number(1.0)), out=form.output)
    return True


_FORMS: dict[str, Callable[[_Form], bool]] = {
    "Attention": _attention,
    "Gelu": _gelu,
    "RMSNormalization": _rms_normalization,
    "RotaryEmbedding": _rotary_embedding,
}
_LOWEST = {
    TensorProto.FLOAT: float(np.finfo(np.float32).min),
    TensorProto.FLOAT16: float(np.finfo(np.float16).min),
    TensorProto.BFLOAT16: -3e38,
}
"""What a masked score becomes: finite, so that no product of it is NaN."""
_UNKNOWN = onnx.TypeProto.Tensor()


def _types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Element types and shapes of all tensors whose ones ONNX can tell."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found = {x.name: x.type.tensor_type for x in (*graph.input, *graph.value_info, *graph.output)}
    return found | {x.name: helper.make_tensor_type_proto(x.data_type, x.dims).tensor_type for x in graph.initializer}
