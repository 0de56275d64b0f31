"""A decoder's attentions as GroupQueryAttention, ONNX Runtime's operator that reads and writes a cache in place.

The portable graph joins past and present with Concat, which copies the whole cache on every token. GroupQueryAttention writes the new
keys and values behind the old ones where past and present are one buffer (see `cache_buffers`), and looks at the tokens that are
there, not at the room behind them. Fed with a past of its exact length and a present of its own, it computes what Concat and
Attention did, so an engine still takes any feeds that its portable graph takes but a batch of several new tokens behind a past.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CAPACITY = "capacity"
"""Name of the cache's axis of tokens in a graph that can work in place."""
_DOMAIN = "com.microsoft"
_KERNELS = (TensorProto.FLOAT, TensorProto.FLOAT16)
"""Types that GroupQueryAttention has on the CPU."""
_HEAD_STEP = 8
"""Its heads' widths are multiples of this."""
_SWAP = [0, 2, 1, 3]


def share_cache(model: onnx.ModelProto) -> int:
    """Lets a decoder work on its cache in place: all of its attentions, or none where one is not as `graph.components` makes them.

    Args:
        model: Changed. Graphs without a cache stay as they are.

    Returns:
        How many attentions were replaced.
    """
    graph = model.graph
    caches = {x.name: x for x in graph.input if x.name.startswith("past_key_values.")}
    rewriter = _Rewriter(graph)
    found = [a for node in graph.node if (a := rewriter.attention(node, caches)) is not None]
    if not found or 2 * len(found) != len(caches) or any(a.kind not in _KERNELS or a.head_dim % _HEAD_STEP for a in found):
        return 0
    rewriter.replace(found)
    for value in (*graph.input, *graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[2].dim_param = CAPACITY
    if all(x.domain != _DOMAIN for x in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return len(found)


@dataclass(frozen=True)
class _Attention:
    """One attention of a portable graph: its node, and where the parts of its cache come from."""

    node: onnx.NodeProto
    keys: onnx.NodeProto
    values: onnx.NodeProto
    heads: int
    groups: int
    head_dim: int
    kind: int


class _Rewriter:
    """A graph, and its nodes as they are written anew."""

    def __init__(self, graph: onnx.GraphProto):
        self.graph = graph
        self.nodes: list[onnx.NodeProto] = []
        self.producer = {name: node for node in graph.node for name in node.output}
        self.constants = {x.name: x for x in graph.initializer}

    def attention(self, node: onnx.NodeProto, caches: dict[str, onnx.ValueInfoProto]) -> _Attention | None:
        """What there is to know of a node that attends to a cache; None for others."""
        if node.op_type != "Attention" or node.domain or len(node.input) != 4 or {a.name for a in node.attribute} - {"scale"}:
            return None
        joins = [self.producer.get(name) for name in node.input[1:3]]
        if any(join is None or join.op_type != "Concat" or len(join.input) != 2 or join.input[0] not in caches for join in joins):
            return None
        cache = caches[joins[0].input[0]].type.tensor_type
        width, (_, groups, _, head_dim) = self._width(self._source(node.input[0])), (x.dim_value for x in cache.shape.dim)
        return width and _Attention(node, *joins, width // head_dim, groups, head_dim, cache.elem_type)

    def replace(self, attentions: list[_Attention]) -> None:
        """Writes the graph again with these replaced, and without what nothing uses any more."""
        fused = {a.node.output[0]: a for a in attentions}
        joins = {join.output[0] for a in attentions for join in (a.keys, a.values)}
        lengths, biases, flat = self._lengths(), {}, {}
        for node in self.graph.node:
            if (a := fused.get(node.output[0])) is not None:
                mask = node.input[3]
                biases[mask] = biases.get(mask) or self._bias(mask, a.kind)
                flat[node.output[0]] = self._fused(a, lengths, biases[mask])
            elif (joined := self._joined(node)) in flat:
                self._add("Identity", flat[joined], out=[node.output[0]])
            elif node.output[0] not in joins:
                self.nodes.append(node)
        kept = self._used()
        del self.graph.node[:]
        self.graph.node.extend(kept)

    def _fused(self, a: _Attention, lengths: list[str], bias: str) -> str:
        """Writes the node, and its output in the portable form for whoever wants it so; returns [batch, tokens, heads * head_dim]."""
        query, key = self._flat(a.node.input[0], a.heads), self._flat(a.keys.input[1], a.groups)
        inputs = [query, key, self._flat(a.values.input[1], a.groups), a.keys.input[0], a.values.input[0], *lengths, "", "", "", bias]
        out = f"{a.node.output[0]}.flat"
        attributes = {"num_heads": a.heads, "kv_num_heads": a.groups} | {x.name: x.f for x in a.node.attribute}
        self._add("GroupQueryAttention", *inputs, out=[out, a.keys.output[0], a.values.output[0]], domain=_DOMAIN, **attributes)
        split = self._add("Reshape", out, self._constant([0, 0, -1, a.head_dim]))
        self._add("Transpose", split, out=[a.node.output[0]], perm=_SWAP)
        return out

    def _source(self, value: str) -> str | None:
        """The [batch, tokens, heads * head_dim] that was split, transposed and rotated, if that is all that was done; None else."""
        node = self.producer.get(value)
        if node is not None and node.op_type == "RotaryEmbedding":
            return self._source(node.input[0])
        split = self.producer.get(node.input[0]) if node is not None and _swaps(node) else None
        return split.input[0] if split is not None and split.op_type == "Reshape" else None

    def _flat(self, value: str, heads: int) -> str:
        """[batch, heads, tokens, head_dim] as [batch, tokens, heads * head_dim], at no cost where it was that before."""
        source, node = self._source(value), self.producer.get(value)
        if source is None:
            return self._add("Reshape", self._add("Transpose", value, perm=_SWAP), self._constant([0, 0, -1]))
        if node.op_type != "RotaryEmbedding":
            return source
        attributes = {x.name: helper.get_attribute_value(x) for x in node.attribute}
        return self._add("RotaryEmbedding", self._flat(node.input[0], heads), *node.input[1:], **attributes, num_heads=heads)

    def _joined(self, node: onnx.NodeProto) -> str | None:
        """The attention output that a node brings back to [batch, tokens, heads * head_dim]."""
        swap = self.producer.get(node.input[0]) if node.op_type == "Reshape" else None
        return swap.input[0] if swap is not None and _swaps(swap) else None

    def _lengths(self) -> list[str]:
        """Tokens with those of this step: of every row, less one, [batch] int32; and of the batch, int32."""
        total = self._add("Shape", "attention_mask", start=1, end=2)
        total = self._add("Cast", self._add("Squeeze", total), to=TensorProto.INT32)
        last = self._add("Sub", total, self._constant(1, np.int32))
        return [self._add("Expand", last, self._add("Shape", "attention_mask", start=0, end=1)), total]

    def _bias(self, mask: str, kind: int) -> str:
        """A boolean mask as what is added to scores. Half the type's range, so that a sum with a score stays within it."""
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        return self._add("Where", mask, self._constant(0, dtype), self._constant(np.finfo(dtype).min / 2, dtype))

    def _width(self, value: str | None) -> int | None:
        """Size of the last axis of what a linear map makes, whatever form its weights have; None where it is unknown."""
        if value in self.constants:
            return self.constants[value].dims[-1] if self.constants[value].dims else None
        node = self.producer.get(value)
        if node is None:
            return None
        if node.op_type == "MatMulNBits":
            return next(x.i for x in node.attribute if x.name == "N")
        if node.op_type == "ConstantOfShape":
            return int(numpy_helper.to_array(self.constants[node.input[0]])[-1])
        if node.op_type == "MatMul":
            return self._width(node.input[1])
        if node.op_type in ("Add", "Cast", "DequantizeLinear"):
            return next((width for x in node.input if (width := self._width(x)) is not None), None)
        return None

    def _used(self) -> list[onnx.NodeProto]:
        wanted = {x.name for x in self.graph.output}
        kept = []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                wanted.update(node.input)
                kept.append(node)
        return kept[::-1]

    def _add(self, op: str, *inputs: str, out: list[str] | None = None, **attributes: Any) -> str:
        out = out or [f"shared_cache.{len(self.nodes)}"]
        self.nodes.append(helper.make_node(op, inputs, out, f"{op}_shared_{len(self.nodes)}", **attributes))
        return out[0]

    def _constant(self, value: Any, dtype: Any = np.int64) -> str:
        array = np.asarray(value, dtype)
        name = f"shared_cache.{array.dtype}_{'_'.join(map(str, array.ravel().tolist()))}"
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(array, name)
            self.graph.initializer.append(self.constants[name])
        return name


def _swaps(node: onnx.NodeProto) -> bool:
    """Whether a node exchanges heads and tokens."""
    return node.op_type == "Transpose" and [list(x.ints) for x in node.attribute] == [_SWAP]
