"""A decoder's cache as TensorRT writes it in place: TensorScatter, which its parser takes for a KV-cache update.

The portable graph joins past and present with Concat, a copy of the whole cache on every token. Here past and present are one buffer of
a fixed number of tokens; the update writes the new keys and values behind the old ones, and Attention gets the part that is there, not
the room behind it, so that its work follows the tokens used. All else of the graph, the mask included, stays as it is.
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
    if not caches or not as_made or len(readers) != len(caches) or own.version < ATTENTION_OPSET:
        return 0
    joined = {n.output[0] for n in readers}
    nodes = list(_lengths(graph))
    for node in graph.node:
        if node.output[0] in joined:
            past, new, present = *node.input, node.output[0]
            nodes.append(_node("TensorScatter", past, new, "cache.written", out=present, axis=TOKENS))
            nodes.append(_node("Slice", present, "cache.start", "cache.tokens", "cache.axis", out=f"{present}.used"))
        else:
            node.input[:] = [f"{name}.used" if name in joined else name for name in node.input]
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    for value in (*graph.input, *graph.output):
        if value.name in caches | joined:
            value.type.tensor_type.shape.dim[TOKENS].dim_value = capacity
    own.version = OPSET
    return len(readers)


def _lengths(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Tokens with those of this step, [1]; and those that every row has already, [batch]. Both int64."""
    for name, value in (("cache.start", 0), ("cache.axis", TOKENS)):
        graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    yield _node("Shape", "attention_mask", out="cache.tokens", start=1, end=2)
    yield _node("Shape", "inputs_embeds", out="cache.new", start=1, end=2)
    yield _node("Shape", "inputs_embeds", out="cache.batch", start=0, end=1)
    yield _node("Sub", "cache.tokens", "cache.new", out="cache.old")
    yield _node("Expand", "cache.old", "cache.batch", out="cache.written")


def _node(operator: str, *inputs: str, out: str, **attributes: int) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [out], f"{operator}_{out}", **attributes)
