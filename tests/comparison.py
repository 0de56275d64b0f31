"""The two sides of a comparison: exported graphs in ONNX Runtime, and the stock forward in PyTorch.

Imported by path through conftest, like `networks`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from infoprune_export.bundle import COMPONENTS, DECODER, EMBED, VISION, graph_file
from infoprune_export.precision import float_type


class Graphs:
    """The three graphs of a directory in ONNX Runtime."""

    def __init__(self, directory: Path, dtype: str = "fp32"):
        """The graphs of a precision; those with quantised weights multiply in float."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        self.element = {"fp32": np.float32, "fp16": np.float16}[float_type(dtype)]
        self.sessions = {
            c: ort.InferenceSession(str(directory / graph_file(c, dtype)), options, providers=["CPUExecutionProvider"]) for c in COMPONENTS
        }

    def vision(self, pixel_values: np.ndarray) -> np.ndarray:
        return self.sessions[VISION].run(None, {"pixel_values": pixel_values.astype(self.element)})[0]

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self.sessions[EMBED].run(None, {"input_ids": ids})[0]

    def decode(self, embeds, mask, positions, past: list[np.ndarray] | None) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits and the new past."""
        inputs = self.sessions[DECODER].get_inputs()
        past = past or [np.zeros((len(embeds), i.shape[1], 0, i.shape[3]), self.element) for i in inputs[3:]]
        values = [embeds.astype(self.element), mask, positions, *past]
        logits, *past = self.sessions[DECODER].run(None, {i.name: v for i, v in zip(inputs, values, strict=True)})
        return logits, past


class Stock:
    """The stock forward of a PyTorch model, with the same methods."""

    def __init__(self, model):
        self.model = model

    @torch.inference_mode()
    def vision(self, pixel_values: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(pixel_values).to(self.model.dtype)
        return torch.stack(list(self.model.get_image_features(pixel_values=pixels).pooler_output)).numpy()

    @torch.inference_mode()
    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self.model.get_input_embeddings()(torch.from_numpy(ids)).numpy()

    @torch.inference_mode()
    def decode(self, embeds, mask, positions, past):
        out = self.model.model.language_model(
            inputs_embeds=torch.from_numpy(embeds).to(self.model.dtype),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions),
            past_key_values=past,
            use_cache=True,
        )
        return self.model.lm_head(out.last_hidden_state[:, -1:]).numpy(), out.past_key_values


def steps(decode: Callable, lengths=(9, 5), widths=(1, 2, 1), hidden: int = 48) -> list[np.ndarray]:
    """Logits of a prefill of left-padded rows with the given lengths, and of steps of the given widths after it."""
    rng = np.random.default_rng(0)
    rows, longest = len(lengths), max(lengths)
    mask = np.stack([np.arange(longest) >= longest - n for n in lengths]).astype(np.int64)
    embeds = rng.standard_normal((rows, longest, hidden)).astype(np.float32)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    logits, past = decode(embeds, mask, positions, None)
    seen = [logits]
    for width in widths:
        embeds = rng.standard_normal((rows, width, hidden)).astype(np.float32)
        mask = np.concatenate([mask, np.ones((rows, width), np.int64)], axis=1)
        positions = positions[:, -1:] + 1 + np.arange(width)
        logits, past = decode(embeds, mask, positions, past)
        seen.append(logits)
    return seen


def pixels(images: int = 3) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((images, 3, 16, 16)).astype(np.float32)


def assert_same_network(left, right, atol: float, lengths=(9, 5)) -> None:
    """Vision, embedding, prefill with padding and steps after it agree, relative to the largest value."""
    ids = np.array([[3, 4, 90], [5, 99, 2]])
    pairs = [(left.vision(pixels()), right.vision(pixels())), (left.embed(ids), right.embed(ids))]
    pairs += zip(steps(left.decode, lengths), steps(right.decode, lengths), strict=True)
    for a, b in pairs:
        assert a.shape == b.shape
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a / np.abs(b).max(), b / np.abs(b).max(), rtol=0, atol=atol)
