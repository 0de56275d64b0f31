"""A toy network as three ONNX graphs made by hand, fit for the packaged model's tokenizer and images.

Imported by path through conftest: `from toy_network import Toy`. The decoder is one attention layer over embeddings
with learned positions. `Toy.greedy` computes the same in NumPy, one prompt at a time and without a cache.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from infoprune_export.bundle import COMPONENTS, graph_file

VOCAB, IMAGE, EOS, HIDDEN, HEAD, PATCH, TOKENS = 434, 433, 432, 12, 8, 8, 64


class Toy:
    """The weights, and what they answer."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
        self.patches, self.table, self.positions = draw(HIDDEN, 3, PATCH, PATCH) / 8, draw(VOCAB, HIDDEN), draw(512, HIDDEN)
        self.q, self.k, self.v, self.head = draw(HIDDEN, HEAD), draw(HIDDEN, HEAD), draw(HIDDEN, HEAD), draw(HEAD, VOCAB)

    def features(self, pixels: np.ndarray) -> np.ndarray:
        n, c, h, w = pixels.shape
        blocks = pixels.reshape(n, c, h // PATCH, PATCH, w // PATCH, PATCH).transpose(0, 2, 4, 1, 3, 5)
        return blocks.reshape(n, -1, c * PATCH * PATCH) @ self.patches.reshape(HIDDEN, -1).T

    def logits(self, ids: np.ndarray, pixels: np.ndarray | None) -> np.ndarray:
        x = self.table[ids]
        if pixels is not None:
            x[ids == IMAGE] = self.features(pixels).reshape(-1, HIDDEN)
        x = x + self.positions[: len(ids)]
        scores = (x[-1] @ self.q) @ (x @ self.k).T
        weights = np.exp(scores - scores.max())
        return (weights / weights.sum()) @ (x @ self.v) @ self.head

    def greedy(self, ids: np.ndarray, pixels: np.ndarray | None, new: int) -> np.ndarray:
        for _ in range(new):
            ids = np.append(ids, self.logits(ids, pixels).argmax())
        return ids[-new:]

    def write(self, directory: Path, kind: int = TensorProto.FLOAT, dtype: str = "fp32") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        port = lambda name, shape, kind=kind: helper.make_tensor_value_info(name, kind, shape)
        whole = TensorProto.INT64
        past = [port(f"past_key_values.0.{x}", ["batch", 1, "past", HEAD]) for x in ("key", "value")]
        present = [port(f"present.0.{x}", ["batch", 1, "total", HEAD]) for x in ("key", "value")]
        ids, embeds = port("input_ids", ["batch", "sequence"], whole), port("inputs_embeds", ["batch", "sequence", HIDDEN])
        mask, position = port("attention_mask", ["batch", "total"], whole), port("position_ids", ["batch", "sequence"], whole)
        pixels, features = port("pixel_values", ["images", 3, 64, 64]), port("image_features", ["images", TOKENS, HIDDEN])
        logits = port("logits", ["batch", 1, VOCAB])
        decoder = """Gather positions position_ids > p; Add inputs_embeds p > x; Gather x last > query axis=1
            MatMul query wq > q; Unsqueeze q one > q4; MatMul x wk > k; Unsqueeze k one > k4; MatMul x wv > v; Unsqueeze v one > v4
            Concat past_key_values.0.key k4 > present.0.key axis=2; Concat past_key_values.0.value v4 > present.0.value axis=2
            Transpose present.0.key > kt perm=0,1,3,2; MatMul q4 kt > s; Cast attention_mask > m to=KIND; Sub m unit > n
            Mul n large > bias; Unsqueeze bias middle > b4; Add s b4 > sb; Softmax sb > w axis=-1; MatMul w present.0.value > o4
            Squeeze o4 one > o; MatMul o head > logits"""
        constants = {"positions": self.positions, "wq": self.q, "wk": self.k, "wv": self.v, "head": self.head, "unit": 1.0, "large": 1e4}
        constants |= {"last": np.array([-1]), "one": np.array([1]), "middle": np.array([1, 2])}
        graphs = {
            "vision_encoder": (
                f"Conv pixel_values w > c strides={PATCH},{PATCH}; Reshape c flat > f; Transpose f > image_features perm=0,2,1",
                {"w": self.patches, "flat": np.array([0, HIDDEN, TOKENS])},
                [pixels],
                [features],
            ),
            "embed_tokens": ("Gather table input_ids > inputs_embeds", {"table": self.table}, [ids], [embeds]),
            "decoder_model_merged": (decoder, constants, [embeds, mask, position, *past], [logits, *present]),
        }
        for component in COMPONENTS:
            text, weights, inputs, outputs = graphs[component]
            nodes = [node(line, kind) for line in text.replace("\n", ";").split(";")]
            stored = [numpy_helper.from_array(cast(w, kind), name) for name, w in weights.items()]
            graph = helper.make_graph(nodes, component, inputs, outputs, stored)
            path = directory / graph_file(component, dtype)
            model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
            onnx.save(model, path, save_as_external_data=True, location=f"{path.name}_data", size_threshold=512)


def node(text: str, kind: int) -> onnx.NodeProto:
    """`MatMul a b > c axis=1` as a node."""
    left, _, right = text.partition(" > ")
    op, *inputs = left.split()
    output, *attributes = right.split()
    numbers = lambda value: [int(x) for x in value.replace("KIND", str(kind)).split(",")]
    named = {k: numbers(v) if "," in v else numbers(v)[0] for k, v in (a.split("=") for a in attributes)}
    return helper.make_node(op, inputs, [output], name=output, **named)


def cast(weight: np.ndarray | float, kind: int) -> np.ndarray:
    weight = np.asarray(weight)
    return weight.astype(helper.tensor_dtype_to_np_dtype(kind)) if weight.dtype.kind == "f" else weight
