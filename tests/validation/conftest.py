"""A small anatomy, plan and report, and a session that answers without any engine."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from infoprune_export.bundle import Flops
from infoprune_export.engines.base import TensorSpec
from infoprune_export.models.anatomy import Anatomy, Attention, FeedForward, Layer, Linear, Tower, VisionGeometry
from infoprune_export.models.flops import DENOMINATORS, count
from infoprune_export.plans import Budget, LayerPlan, Plan, Source, TrainingRecord
from infoprune_export.recipe import Criterion, Workload
from infoprune_export.runtime.config import ModelConfig
from infoprune_export.validation.gates import judge
from infoprune_export.validation.latency import kept_by_part, timing
from infoprune_export.validation.records import Accuracy, ComponentNumerics, GenerationNumerics, Interval, NotMeasured, PartLatency, Size
from infoprune_export.validation.reference import Reference, ReferencePrompt, text_tokens
from infoprune_export.validation.report import Report

WORKLOAD = Workload(image_tokens=4, text_tokens=6, new_tokens=5)


def _layer(tower: str, index: int, hidden: int, heads: int, groups: int, width: int, gated: bool) -> Layer:
    head_dim = hidden // heads
    linear = lambda role, d_in, d_out: Linear(path=f"{tower}.{index}.{role}", d_in=d_in, d_out=d_out)
    return Layer(
        tower=tower,
        index=index,
        path=f"{tower}.{index}",
        attention=Attention(
            path=f"{tower}.{index}.attention",
            heads=heads,
            kv_groups=groups,
            head_dim=head_dim,
            q=linear("q", hidden, heads * head_dim),
            k=linear("k", hidden, groups * head_dim),
            v=linear("v", hidden, groups * head_dim),
            o=linear("o", heads * head_dim, hidden),
        ),
        ffn=FeedForward(
            path=f"{tower}.{index}.ffn",
            gate=linear("gate", hidden, width) if gated else None,
            up=linear("up", hidden, width),
            down=linear("down", width, hidden),
        ),
    )


@pytest.fixture
def anatomy() -> Anatomy:
    vision = Tower(name="vision", path="v", hidden=12, layers=tuple(_layer("vision", i, 12, 3, 3, 24, False) for i in range(2)))
    language = Tower(name="language", path="l", hidden=16, layers=tuple(_layer("language", i, 16, 4, 2, 32, True) for i in range(3)))
    return Anatomy(
        family="llava",
        vision=vision,
        language=language,
        geometry=VisionGeometry(image_size=8, patch_size=4, channels=3, tokens=5, image_tokens=4),
        projector=(Linear(path="p.0", d_in=12, d_out=16), Linear(path="p.1", d_in=16, d_out=16)),
        vocab_size=32,
        embed_path="l.embed_tokens",
        head_path="lm_head",
    )


@pytest.fixture
def plan(anatomy: Anatomy) -> Plan:
    """One head or group less in every layer, some matrices low-rank."""
    layers = [LayerPlan(tower="vision", layer=i, kv_groups=[0, 2], heads=[0, 2], ranks={"up": 5, "down": None}) for i in range(2)]
    layers += [
        LayerPlan(tower="language", layer=i, kv_groups=[1], heads=[2, 3], ranks={"gate": 6, "up": None, "down": 3}) for i in range(3)
    ]
    before = count(anatomy, WORKLOAD).total
    budget = Budget(scope="all", requested=0.7, predicted=0.69, original_flops=before, compressed_flops=int(0.69 * before))
    source = Source(id="tiny/llava", sha256="0" * 64)
    return Plan(source=source, criterion=Criterion(), workload=WORKLOAD, budget=budget, layers=layers, anatomy=anatomy)


@pytest.fixture
def flops(anatomy: Anatomy, plan: Plan) -> Flops:
    before, after = count(anatomy, WORKLOAD), count(anatomy, WORKLOAD, plan)
    return Flops(
        denominator=DENOMINATORS["all"],
        scope="all",
        requested=0.7,
        achieved=after.total / before.total,
        original=before.total,
        compressed=after.total,
        parts={k: {"original": v, "compressed": after.parts()[k]} for k, v in before.parts().items()},
    )


@pytest.fixture
def report(flops: Flops) -> Report:
    """A report with something of everything."""
    kept = kept_by_part(flops.parts)
    both = {"vision": (4.0, 3.0), "prefill": (9.0, 6.5), "decode": (1.2, 0.9), "end_to_end": (20.0, 14.0)}
    made = Report(
        tool="infoprune-export 0.1.0",
        name="tiny-llava",
        source=Source(id="tiny/llava", sha256="0" * 64),
        measured_at="2026-11-23T12:00:00Z",
        workload=WORKLOAD,
        flops=flops,
        training=TrainingRecord(steps=240, kept=216, data=["tiny:vqa"], images=1, questions=1200),
        accuracy={
            "vqa": Accuracy(
                original=0.95,
                compressed=0.925,
                n=400,
                metric="VQA accuracy",
                engine="ort",
                dtype="fp32",
                original_interval=Interval(low=0.924, high=0.967),
                compressed_interval=Interval(low=0.895, high=0.947),
                drop_points=2.5,
                drop_points_interval=Interval(low=0.6, high=4.4),
            )
        },
        numerics={
            "vision_encoder": ComponentNumerics(engine="onnx", dtype="fp32", max_abs=2e-6, max_rel=1e-6, cosine=1.0, passed=True),
            "generation": GenerationNumerics(engine="onnx", dtype="fp32", prompts=128, identical_token_ids=128, passed=True),
        },
        latency={
            "ort": {
                part: PartLatency(original=timing([a] * 9), compressed=timing([b] * 9), speedup=a / b, flops_kept=kept[part])
                for part, (a, b) in both.items()
            }
        },
        size=Size(original_bytes=12_000_000, compressed_bytes=8_000_000),
        machine={"cpu": "some processor", "threads": 2, "gpus": []},
        not_measured=[NotMeasured(what="latency.trt", reason="no NVIDIA GPU here; run `infoprune-export validate DIR` on the target")],
    )
    made.gates = judge(made, max_drop=3.0, min_speedup=1.2)
    return made


IMAGE_TOKEN, EOS, VOCAB, HIDDEN = 31, 30, 32, 16


class FakeSession:
    """A tiny deterministic language model in numpy: rows of a batch do not touch, padding is masked, caches are values."""

    def __init__(
        self,
        seed: int = 0,
        vocab: int = VOCAB,
        image_token: int = IMAGE_TOKEN,
        image_tokens: int = 4,
        width: int = 8,
        dtype: str = "float32",
    ):
        rng = np.random.default_rng(seed)
        self.table = rng.standard_normal((vocab, HIDDEN))
        self.head = rng.standard_normal((HIDDEN, vocab))
        self.pixels = rng.standard_normal((width, image_tokens * HIDDEN))
        self.config = ModelConfig(image_token_id=image_token, eos_ids=(EOS,), max_positions=None)
        specs = (TensorSpec("attention_mask", np.dtype(np.int64), ()), TensorSpec("inputs_embeds", np.dtype(dtype), ()))
        self.engines = {"decoder_model_merged": SimpleNamespace(inputs=specs, device="cpu")}
        self.images_encoded, self.calls = 0, []

    def encode_images(self, pixel_values: np.ndarray) -> np.ndarray:
        self.images_encoded += len(pixel_values)
        self.calls.append("vision")
        return np.tanh(pixel_values.mean(axis=(1, 2)) @ self.pixels).reshape(len(pixel_values), -1, HIDDEN).astype(np.float32)

    def embed(self, input_ids: np.ndarray, image_features: np.ndarray | None = None) -> np.ndarray:
        embeds = self.table[input_ids].copy()
        if image_features is not None:
            embeds[input_ids == self.config.image_token_id] = image_features.reshape(-1, HIDDEN)
        return embeds

    def prefill(self, inputs_embeds: np.ndarray, attention_mask: np.ndarray, capacity: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        self.calls.append("prefill")
        position = attention_mask.cumsum(1)
        state = (inputs_embeds * (attention_mask * np.cos(position))[..., None]).sum(1)
        return self._logits(state), state

    def step(self, token_ids: np.ndarray, cache: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.calls.append("decode")
        state = 0.7 * cache + self.table[token_ids]
        return self._logits(state), state

    def generate(self, input_ids, pixel_values, max_new_tokens, eos_ids) -> Iterator[np.ndarray]:
        features = self.encode_images(pixel_values) if pixel_values is not None else None
        ids = np.stack(input_ids)
        logits, cache = self.prefill(self.embed(ids, features), np.ones_like(ids))
        for new in range(max_new_tokens):
            yield logits.argmax(-1)
            if new + 1 < max_new_tokens:
                logits, cache = self.step(logits.argmax(-1), cache)

    def _logits(self, state: np.ndarray) -> np.ndarray:
        return (np.tanh(state) @ self.head).astype(np.float32)


@pytest.fixture
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture
def make_session() -> type[FakeSession]:
    return FakeSession


def prompt(rng: np.random.Generator, length: int, image: bool = True) -> np.ndarray:
    text = rng.integers(0, EOS, length)
    return np.concatenate([text[:1], [IMAGE_TOKEN] * (4 if image else 0), text[1:]]).astype(np.int64)


@pytest.fixture
def reference(session: FakeSession) -> Reference:
    """What the fake session answers itself, one prompt at a time: prompts of several lengths, with and without an image."""
    rng = np.random.default_rng(1)
    pixels = rng.standard_normal((3, 3, 3, 8)).astype(np.float32)
    features = session.encode_images(pixels)
    prompts, generated, logits = [], [], []
    for i in range(10):
        image = None if i % 4 == 3 else i % 3
        prompts.append(ReferencePrompt(prompt(rng, 3 + i % 5, image is not None), image))
        ids = prompts[-1].input_ids[None]
        out, cache = session.prefill(session.embed(ids, None if image is None else features[[image]]), np.ones_like(ids))
        logits.append(out[0])
        tokens = [int(out.argmax())]
        while tokens[-1] != EOS and len(tokens) < 6:
            out, cache = session.step(np.array([tokens[-1]]), cache)
            tokens.append(int(out.argmax()))
        generated.append(np.array(tokens, np.int64))
    return Reference(
        prompts=tuple(prompts),
        generated=tuple(generated),
        pixel_values=pixels,
        image_features=features[:2],
        inputs_embeds=session.table[text_tokens(prompts[:4], IMAGE_TOKEN)],
        logits=np.stack(logits[:4]),
        image_token_id=IMAGE_TOKEN,
        eos_token_ids=(EOS,),
        max_new_tokens=6,
    )
