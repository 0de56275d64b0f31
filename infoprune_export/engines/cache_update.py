"""A decoder's cache as TensorRT writes it in place: TensorScatter, which its parser takes for a KV-cache update.

The portable graph joins past and present with Concat, a copy of the whole cache on every token. Here past and present are one buffer of
a fixed number of tokens; the update writes the new keys and values behind the old ones, and Attention gets as many tokens as the mask
has, not the room behind them. The mask may be longer than what there is, with zeros on the right: its last one tells where the tokens
end. So it can grow by a tile at a time, and the steps in between have the same shapes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

ATTENTION_OPSET, OPSET = 23, 24
"""The first with Attention, and the first with TensorScatter."""
TOKENS = 2
"""Axis of a cache [batch, groups, tokens, head_dim]."""
USED = "cache.used"


def update_in_place(model: onnx.ModelProto, capacity: int) -> int:
    """Lets a decoder update its cache in place: all of its caches, or none where one is not as `graph.components` makes them.

    Args:
        model: Changed. Graphs without a cache stay as they are.
        capacity: Tokens that a cache has room for; TensorRT wants to know them when it builds.

    Returns:
        How many caches are updated.
    """
    graph = model.graph
    own = next(x for x in model.opset_import if not x.domain)
    caches, outputs = {x.name for x in graph.input if x.name.startswith("past_key_values.")}, {x.name for x in graph.output}
    readers = [n for n in graph.node if caches.intersection(n.input)]
    as_made = all(n.op_type == "Concat" and len(n.input) == 2 and n.input[0] in caches and n.output[0] in outputs for n in readers)
    places = _places_of_queries(graph)
    if not caches or not as_made or len(readers) != len(caches) or places is None or own.version < ATTENTION_OPSET:
        return 0
    joined = {n.output[0] for n in readers}
    nodes = list(_lengths(graph, capacity))
    for node in graph.node:
        if node.output[0] in joined:
            past, new, present = *node.input, node.output[0]
            nodes.append(_node("TensorScatter", past, new, "cache.written", out=present, axis=TOKENS))
            nodes.append(_node("Slice", present, "cache.start", "cache.mask", "cache.axis", out=f"{present}.seen"))
        else:
            node.input[:] = [f"{name}.seen" if name in joined else name for name in node.input]
            nodes.append(node)
    for node in places:
        node.input[0] = USED
    del graph.node[:]
    graph.node.extend(nodes)
    for value in (*graph.input, *graph.output):
        if value.name in caches | joined:
            value.type.tensor_type.shape.dim[TOKENS].dim_value = capacity
    own.version = OPSET
    return len(readers)


def _places_of_queries(graph: onnx.GraphProto) -> list[onnx.NodeProto] | None:
    """Where the graph takes this step's tokens from the mask's length; None where that length means something else to it as well."""

    def readers(tensors: set[str]) -> list[onnx.NodeProto]:
        return [n for n in graph.node if tensors.intersection(n.input)]

    def lengths(tensor: str) -> tuple[set[str], bool]:
        """Scalars that hold the length of a tensor's second axis, and whether that is all that is known of its shape."""
        shapes = {n.output[0] for n in readers({tensor}) if n.op_type == "Shape"}
        return {n.output[0] for n in readers(shapes)}, all(n.op_type == "Squeeze" for n in readers(shapes))

    totals, known = lengths("attention_mask")
    steps, _ = lengths("inputs_embeds")
    places = [n for n in readers(totals) if n.op_type == "Sub" and n.input[1] in steps]
    return places if known and all(n in places or n.op_type == "Range" for n in readers(totals)) else None


def _lengths(graph: onnx.GraphProto, capacity: int) -> Iterator[onnx.NodeProto]:
    """Length of the mask, [1]; tokens with those of this step, a scalar; those that every row has already, [batch]. All int64.

    The last stay within the cache whatever the mask says: TensorRT times kernels on inputs that nobody has filled.
    """
    constants = {"cache.start": [0], "cache.axis": [TOKENS], "cache.zero": 0, "cache.one": 1, "cache.capacity": capacity}
    for name, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    yield _node("Shape", "attention_mask", out="cache.mask", start=1, end=2)
    yield _node("Squeeze", "cache.mask", out="cache.length")
    yield _node("Range", "cache.zero", "cache.length", "cache.one", out="cache.places")
    yield _node("Add", "cache.places", "cache.one", out="cache.ends")
    yield _node("Mul", "attention_mask", "cache.ends", out="cache.attended")
    yield _node("ReduceMax", "cache.attended", out=USED, keepdims=0)
    yield _node("Shape", "inputs_embeds", out="cache.new", start=1, end=2)
    yield _node("Shape", "inputs_embeds", out="cache.batch", start=0, end=1)
    yield _node("Sub", USED, "cache.new", out="cache.old")
    yield _node("Sub", "cache.capacity", "cache.new", out="cache.last")
    yield _node("Min", "cache.old", "cache.last", out="cache.bounded")
    yield _node("Max", "cache.bounded", "cache.zero", out="cache.place")
    yield _node("Expand", "cache.place", "cache.batch", out="cache.written")


def _node(operator: str, *inputs: str, out: str, **attributes: int) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [out], f"{operator}_{out}", **attributes)
