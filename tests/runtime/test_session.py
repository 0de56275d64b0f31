from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from toy_network import EOS, IMAGE, TOKENS, Toy

from infoprune_export.bundle import COMPONENTS, Bundle
from infoprune_export.engines.onnxruntime import build
from infoprune_export.errors import InputError
from infoprune_export.runtime.session import Session, left_pad

RNG = np.random.default_rng(3)
PIXELS = RNG.standard_normal((3, 3, 64, 64)).astype(np.float32)
PROMPTS = [
    np.r_[[7, 8], [IMAGE] * TOKENS, RNG.integers(0, 400, 9)],
    RNG.integers(0, 400, 4),
    np.r_[[IMAGE] * TOKENS, [5], [IMAGE] * TOKENS, RNG.integers(0, 400, 3)],
]
OWN = [PIXELS[:1], None, PIXELS[1:]]
"""Images of each prompt."""


@pytest.fixture
def session(bundle: Bundle) -> Session:
    return Session.open(bundle, engine="onnx", threads=1)


def test_encode_images(session: Session, toy: Toy) -> None:
    features = session.encode_images(PIXELS.astype(np.float64))
    assert features.shape == (3, TOKENS, 12) and features.dtype == np.float32
    np.testing.assert_allclose(features, toy.features(PIXELS), atol=1e-4)


def test_logits_of_every_step(session: Session, toy: Toy) -> None:
    ids = PROMPTS[0]
    logits, cache = session.prefill(session.embed(ids[None], session.encode_images(PIXELS[:1])), np.ones((1, len(ids))))
    for _ in range(4):
        assert logits.dtype == np.float32 and logits.shape == (1, 434)
        np.testing.assert_allclose(logits[0], toy.logits(ids, PIXELS[:1]), atol=2e-4)
        ids = np.append(ids, logits.argmax())
        logits, cache = session.step(logits.argmax(-1), cache)
    assert cache.attention_mask.shape == (1, len(ids))


def test_a_cache_can_be_continued_twice(session: Session) -> None:
    _, cache = session.prefill(session.embed(PROMPTS[1][None]), np.ones((1, 4)))
    first, _ = session.step(np.array([9]), cache)
    session.step(np.array([11]), cache)
    np.testing.assert_array_equal(session.step(np.array([9]), cache)[0], first)


def test_an_image_token_that_the_model_says_itself_is_read_like_any_other(session: Session, toy: Toy) -> None:
    _, cache = session.prefill(session.embed(PROMPTS[1][None]), np.ones((1, 4)))
    logits, _ = session.step(np.array([IMAGE]), cache)
    np.testing.assert_allclose(logits[0], toy.logits(np.append(PROMPTS[1], IMAGE), None), atol=2e-4)


@pytest.mark.parametrize("prompt", range(3))
def test_generate_one(session: Session, toy: Toy, prompt: int) -> None:
    tokens = [int(t[0]) for t in session.generate([PROMPTS[prompt]], OWN[prompt], 6, eos_ids=())]
    assert tokens == toy.greedy(PROMPTS[prompt], OWN[prompt], 6).tolist()


def test_generate_a_batch_of_different_lengths(session: Session, toy: Toy) -> None:
    tokens = np.stack(list(session.generate(PROMPTS, PIXELS, 6, eos_ids=())), axis=1)
    assert tokens.tolist() == [toy.greedy(p, x, 6).tolist() for p, x in zip(PROMPTS, OWN, strict=True)]


def test_finished_rows_wait_for_the_others(session: Session, toy: Toy) -> None:
    alone = [toy.greedy(p, x, 8) for p, x in zip(PROMPTS, OWN, strict=True)]
    end = int(alone[0][2])
    stops = [next((i for i, t in enumerate(a) if t == end), 7) for a in alone]
    tokens = np.stack(list(session.generate(PROMPTS, PIXELS, 8, eos_ids=[end])), axis=1)
    assert tokens.shape[1] == max(stops) + 1
    for row, stop, own in zip(tokens, stops, alone, strict=True):
        assert row[: stop + 1].tolist() == own[: stop + 1].tolist()
        assert set(row[stop + 1 :]) <= {end}


def test_generation_stops_where_positions_end(session: Session) -> None:
    assert session.config.max_positions == 160
    prompt = np.full(158, 3)
    assert len(list(session.generate([prompt], None, 50, eos_ids=()))) == 3  # two are read, the last is not
    with pytest.raises(InputError, match="takes 161 tokens, the model has 160 positions"):
        next(session.generate([np.full(161, 3)], None, 5))


def test_the_models_own_end_tokens(session: Session) -> None:
    assert session.config.eos_ids == (EOS,)
    first = int(next(session.generate([PROMPTS[1]], None, 1))[0])
    session.config = replace(session.config, eos_ids=(first,))
    assert len(list(session.generate([PROMPTS[1]], None, 9))) == 1


def test_half_precision(bundle: Bundle, toy: Toy) -> None:
    session = Session.open(bundle, engine="onnx", dtype="fp16", threads=1)
    features = session.encode_images(PIXELS[:1])
    embeds = session.embed(PROMPTS[0][None], features)
    logits, cache = session.prefill(embeds, np.ones((1, len(PROMPTS[0]))))
    assert features.dtype == embeds.dtype == next(iter(cache.past.values())).dtype == np.float16
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[0], toy.logits(PROMPTS[0], PIXELS[:1]), atol=0.1)


@pytest.mark.parametrize(
    ("ids", "images"), [(PROMPTS[0], 2), (PROMPTS[0], 0), (PROMPTS[1], 1), (PROMPTS[0][:-12], 1), (np.r_[[IMAGE] * 63, [1]], 1)]
)
def test_image_tokens_and_images_have_to_match(session: Session, ids: np.ndarray, images: int) -> None:
    features = session.encode_images(PIXELS[:images]) if images else None
    with pytest.raises(InputError, match="image tokens, the images need"):
        session.embed(ids[None], features)


def test_images_shared_unevenly_between_rows_are_refused(session: Session) -> None:
    rows = np.stack([np.r_[[IMAGE] * 32, np.ones(64, int)], np.r_[[IMAGE] * 96]])
    with pytest.raises(InputError, match="the prompt has 128 image tokens"):
        session.embed(rows, session.encode_images(PIXELS[:2]))


def test_ort_engines(bundle_dir: Path, tmp_path: Path, toy: Toy) -> None:
    shutil.copytree(bundle_dir, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    with pytest.raises(InputError, match=r"has no vision_encoder for ort in fp32\nbuild it: infoprune-export build .*b --target ort"):
        Session.open(bundle)
    for component in COMPONENTS:
        graph = bundle.graph(component)
        build(graph, bundle.engines("ort") / graph.name)
    session = Session.open(bundle, threads=1)
    tokens = np.stack(list(session.generate(PROMPTS, PIXELS, 6, eos_ids=())), axis=1)
    assert tokens[2].tolist() == toy.greedy(PROMPTS[2], OWN[2], 6).tolist()


def test_what_a_bundle_does_not_hold(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="does not hold the original network\nmake the bundle with --original"):
        Session.open(bundle, engine="onnx", original=True)
    with pytest.raises(InputError, match="for onnx in bf16\nmake the bundle with --dtype bf16"):
        Session.open(bundle, engine="onnx", dtype="bf16")


def test_left_pad() -> None:
    ids, mask = left_pad([np.array([5, 6]), np.array([7])], pad_id=9)
    assert ids.tolist() == [[5, 6], [9, 7]] and mask.tolist() == [[1, 1], [0, 1]]
    assert ids.dtype == mask.dtype == np.int64


def test_generation_is_lazy(session: Session) -> None:
    assert len(list(islice(session.generate([PROMPTS[1]], None, 10**9, eos_ids=()), 2))) == 2
