"""Graphs made only to be timed: the three components of a model, their layers kept whole or in part.

They have the operators, shapes and names of exported graphs. Weights are constants that ONNX Runtime makes while it loads a graph,
each with a value of its own so that no two are taken for one: the files hold a few kB, and times of dense products do not depend
on values. What a model's config alone would tell is the same for all: LayerNorm and a bias-free head, SiLU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from infoprune_export.engines.cache_fusion import share_cache
from infoprune_export.models.anatomy import Anatomy, Layer, Linear
from infoprune_export.recipe import Dtype

OPSET, IR_VERSION = 23, 10
_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Block:
    """What a stack has of one layer.

    Attributes:
        layer: Its sizes.
        groups: KV groups of its attention.
        ranks: Feed-forward role to rank, None for dense.
    """

    layer: Layer
    groups: int
    ranks: dict[str, int | None]


def whole(layer: Layer) -> Block:
    """A layer of the original."""
    return Block(layer, layer.attention.kv_groups, dict.fromkeys(layer.ffn.matrices))


class _Graph:
    """A graph as it is written."""

    def __init__(self, dtype: Dtype):
        self.type = _TYPES[dtype]
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def add(self, op: str, *inputs: str, out: str | None = None, **attributes: object) -> str:
        out = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], **attributes))
        return out

    def input(self, name: str, shape: Sequence[int | str], kind: int | None = None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind or self.type, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, self.type, shape))

    def integers(self, *values: int) -> str:
        return self._constant("i" + "_".join(map(str, values)), np.array(values, np.int64))

    def weight(self, *shape: int) -> str:
        n, fan_in = len(self.nodes), shape[0] if len(shape) > 1 else 1
        value = (1 + (-1) ** n * n / 4096) / fan_in  # about what keeps activations as they are, and no two alike
        filler = helper.make_tensor("value", self.type, [1], [value])
        return self.add("ConstantOfShape", self.integers(*shape), value=filler)

    def linear(self, x: str, linear: Linear, d_in: int | None = None, d_out: int | None = None, rank: int | None = None) -> str:
        """A map with its own sizes, or with fewer inputs or outputs, or as a pair."""
        d_in, d_out = d_in or linear.d_in, d_out or linear.d_out
        for rows, columns in [(d_in, d_out)] if rank is None else [(d_in, rank), (rank, d_out)]:
            x = self.add("MatMul", x, self.weight(rows, columns))
        return self.add("Add", x, self.weight(d_out)) if linear.bias else x

    def silu(self, x: str) -> str:
        return self.add("Mul", x, self.add("Sigmoid", x))

    def save(self, path: Path, shared: bool = False) -> Path:
        graph = helper.make_graph(self.nodes, path.stem, self.inputs, self.outputs, list(self.constants.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        if shared:
            share_cache(model)
        onnx.save(model, path)
        return path

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = numpy_helper.from_array(value, name)
        return name


Attend = Callable[[Block, list[str]], str]
"""What a tower does between the projections: a block with its query, key and value, each [batch, heads, tokens, head_dim]."""


def vision(path: Path, anatomy: Anatomy, blocks: Sequence[Block], dtype: Dtype) -> Path:
    """A vision encoder of these blocks, with the projector."""
    g, size = _Graph(dtype), anatomy.geometry
    pixels = g.input("pixel_values", ("images", size.channels, size.image_size, size.image_size))
    width, patch = anatomy.vision.hidden, size.patch_size
    x = g.add("Conv", pixels, g.weight(width, size.channels, patch, patch), strides=[patch, patch])
    x = g.add("Transpose", g.add("Reshape", x, g.integers(0, 0, -1)), perm=[0, 2, 1])
    extra = size.tokens - (size.image_size // patch) ** 2
    if extra:
        x = g.add("Concat", g.add("Slice", x, g.integers(0), g.integers(extra), g.integers(1)), x, axis=1)
    x = _blocks(g, g.add("Add", x, g.weight(size.tokens, width)), blocks, _attend_all(g))
    x = g.add("Slice", x, g.integers(0), g.integers(size.image_tokens), g.integers(1))
    for i, linear in enumerate(anatomy.projector):
        x = g.linear(g.silu(x) if i else x, linear)
    g.add("Identity", x, out="image_features")
    g.output("image_features", ("images", size.image_tokens, anatomy.projector[-1].d_out))
    return g.save(path)


def embedding(path: Path, anatomy: Anatomy, dtype: Dtype) -> Path:
    """The embedding of tokens."""
    g = _Graph(dtype)
    ids = g.input("input_ids", ("batch", "sequence"), TensorProto.INT64)
    g.add("Gather", g.weight(anatomy.vocab_size, anatomy.language.hidden), ids, out="inputs_embeds")
    g.output("inputs_embeds", ("batch", "sequence", anatomy.language.hidden))
    return g.save(path)


def decoder(path: Path, anatomy: Anatomy, blocks: Sequence[Block], dtype: Dtype, shared: bool = False) -> Path:
    """A decoder of these blocks, with its head; `shared`: as an ONNX Runtime engine has it, working on its cache in place."""
    g, hidden = _Graph(dtype), anatomy.language.hidden
    x = g.input("inputs_embeds", ("batch", "sequence", hidden))
    mask = g.input("attention_mask", ("batch", "past + sequence"), TensorProto.INT64)
    positions = g.input("position_ids", ("batch", "sequence"), TensorProto.INT64)
    x = _blocks(g, x, blocks, _attend_to_the_past(g, x, mask, positions, blocks[0].layer.attention.head_dim))
    x = g.add("RMSNormalization", x, g.weight(hidden))
    x = g.add("Slice", x, g.integers(-1), g.integers(2**62), g.integers(1))
    g.add("MatMul", x, g.weight(hidden, anatomy.vocab_size), out="logits")
    g.output("logits", ("batch", 1, anatomy.vocab_size))
    return g.save(path, shared)


def _blocks(g: _Graph, x: str, blocks: Sequence[Block], attend: Attend) -> str:
    for block in blocks:
        layer, norm = block.layer, "RMSNormalization" if block.layer.tower == "language" else "LayerNormalization"
        x = g.add("Add", x, _attention(g, g.add(norm, x, g.weight(layer.attention.q.d_in)), block, attend))
        x = g.add("Add", x, _feed_forward(g, g.add(norm, x, g.weight(layer.attention.q.d_in)), block))
    return x


def _attention(g: _Graph, x: str, block: Block, attend: Attend) -> str:
    a = block.layer.attention
    heads, split = block.groups * a.heads_per_group, g.integers(0, 0, -1, a.head_dim)
    projected = []
    for linear, kept in ((a.q, heads), (a.k, block.groups), (a.v, block.groups)):
        y = g.linear(x, linear, d_out=kept * a.head_dim)
        projected.append(g.add("Transpose", g.add("Reshape", y, split), perm=[0, 2, 1, 3]))
    y = g.add("Transpose", attend(block, projected), perm=[0, 2, 1, 3])
    return g.linear(g.add("Reshape", y, g.integers(0, 0, -1)), a.o, d_in=heads * a.head_dim)


def _feed_forward(g: _Graph, x: str, block: Block) -> str:
    ffn, ranks = block.layer.ffn, block.ranks
    up = g.linear(x, ffn.up, rank=ranks["up"])
    inner = g.silu(up) if ffn.gate is None else g.add("Mul", g.silu(g.linear(x, ffn.gate, rank=ranks["gate"])), up)
    return g.linear(inner, ffn.down, rank=ranks["down"])


def _attend_all(g: _Graph) -> Attend:
    return lambda block, qkv: g.add("Attention", *qkv)


def _attend_to_the_past(g: _Graph, x: str, mask: str, positions: str, head_dim: int) -> Attend:
    """Causal attention with a cache, rotated, under a mask that is made once."""

    def length(value: str) -> str:
        return g.add("Squeeze", g.add("Shape", value, start=1, end=2))

    zero, one = g.add("Squeeze", g.integers(0)), g.add("Squeeze", g.integers(1))
    keys, queries = length(mask), length(x)
    columns = g.add("Range", zero, keys, one)
    rows = g.add("Add", g.add("Unsqueeze", g.add("Range", zero, queries, one), g.integers(1)), g.add("Sub", keys, queries))
    seen = g.add("Unsqueeze", g.add("Cast", mask, to=TensorProto.BOOL), g.integers(1, 2))
    allowed = g.add("And", g.add("LessOrEqual", columns, rows), seen)
    angles = g.add("Mul", g.add("Cast", g.add("Unsqueeze", positions, g.integers(2)), to=g.type), g.weight(head_dim // 2))
    turn = [g.add("Cos", angles), g.add("Sin", angles)]

    def attend(block: Block, qkv: list[str]) -> str:
        q, k, v = qkv
        joined = []
        n = len(g.outputs) // 2
        for name, new in (("key", g.add("RotaryEmbedding", k, *turn)), ("value", v)):
            past = g.input(f"past_key_values.{n}.{name}", ("batch", block.groups, "past", head_dim))
            joined.append(g.add("Concat", past, new, out=f"present.{n}.{name}", axis=-2))
            g.output(joined[-1], ("batch", block.groups, "past + sequence", head_dim))
        return g.add("Attention", g.add("RotaryEmbedding", q, *turn), *joined, allowed)

    return attend
