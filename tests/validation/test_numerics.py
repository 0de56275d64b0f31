from __future__ import annotations

import numpy as np
import pytest

from infoprune_export.validation.generation import Limits
from infoprune_export.validation.numerics import TOLERANCES, Parted, check, compare, describe


def test_identical_networks_pass(session, reference):
    lines = []
    records = check(session, reference, engine="ort", dtype="fp32", limits=Limits(batch=4, images=2), notify=lines.append)
    assert set(records) == {"vision_encoder", "embed_tokens", "decoder_model_merged", "generation"}
    assert all(r.passed for r in records.values())
    generation = records["generation"]
    assert (generation.prompts, generation.identical_token_ids) == (10, 10)
    assert [line.split(" | ")[:2] for line in lines] == [
        ["PASSED", "vision_encoder (ort, fp32)"],
        ["PASSED", "embed_tokens (ort, fp32)"],
        ["PASSED", "decoder_model_merged (ort, fp32)"],
        ["PASSED", "generation (ort, fp32)"],
    ]


def test_another_network_fails_everything(make_session, reference):
    records = check(make_session(seed=5), reference, engine="ort", dtype="fp32")
    assert not any(r.passed for r in records.values())
    assert records["generation"].message.startswith("generation (ort, fp32): prompt ")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_nan_or_infinity_never_passes_and_names_its_component(bad, dtype):
    actual = np.ones((2, 3), np.float32)
    actual[1, 2] = bad
    record = compare("vision_encoder", actual, np.ones((2, 3), np.float32), "ort", dtype)
    assert not record.passed and record.max_abs is None
    assert record.message == f"vision_encoder (ort, {dtype}): 1 of 6 values of the engine are NaN or infinite"
    assert describe("vision_encoder", record).startswith(f"FAILED | vision_encoder (ort, {dtype}) | ")


def test_a_nan_in_both_does_not_pass_either():
    same = np.array([[1.0, np.nan]])
    assert not compare("decoder_model_merged", same, same, "ort", "fp32").passed


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_nan_logits_fail_generation_even_where_the_argmax_is_right(session, reference, monkeypatch, dtype):
    honest = session._logits

    def with_a_nan(state):
        logits = honest(state)
        # numpy's argmax answers with the first NaN: put it where the right answer is.
        logits[np.arange(len(logits)), logits.argmax(-1)] = np.nan
        return logits

    monkeypatch.setattr(session, "_logits", with_a_nan)
    records = check(session, reference, engine="onnx", dtype=dtype)
    assert not records["generation"].passed and "NaN or infinite logits at new token 1" in records["generation"].message
    assert not records["decoder_model_merged"].passed


def test_the_figures_are_what_they_say():
    record = compare("vision_encoder", np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([[3.0, 4.0], [0.0, 1.0]]), "ort", "fp32")
    assert (record.max_abs, record.max_rel, record.cosine) == (1.0, 0.25, 1.0)
    assert not record.passed


def test_cosine_is_the_worst_rows():
    expected = np.array([[100.0, 0.0], [0.0, 1.0]])
    record = compare("vision_encoder", np.array([[100.0, 0.0], [1.0, 0.0]]), expected, "ort", "bf16")
    assert record.cosine == 0 and record.max_rel < TOLERANCES["bf16"].max_rel and not record.passed


def test_rows_of_zeros_agree_with_each_other_only():
    zeros, ones = np.zeros((1, 2)), np.ones((1, 2))
    assert compare("vision_encoder", zeros, zeros, "ort", "fp32").passed
    assert not compare("vision_encoder", zeros, ones, "ort", "fp32").passed
    assert not compare("vision_encoder", ones, zeros, "ort", "fp32").passed


def test_another_shape_and_an_empty_reference_fail():
    assert "shape [1, 2] instead of [2, 1]" in compare("vision_encoder", np.ones((1, 2)), np.ones((2, 1)), "ort", "fp32").message
    assert not compare("vision_encoder", np.ones((0, 2)), np.ones((0, 2)), "ort", "fp32").passed


def test_half_precision_may_part_at_a_near_tie_and_fp32_may_not(session, reference, monkeypatch):
    first, expected = reference.prompts[0], int(reference.generated[0][0])
    other = (expected + 1) % 30

    honest = session.prefill

    def tied(inputs_embeds, attention_mask):
        logits, cache = honest(inputs_embeds, attention_mask)
        lengths = attention_mask.sum(1)
        for row in np.flatnonzero(lengths == len(first.input_ids)):
            if np.isclose(logits[row].argmax(), expected):
                logits[row, other] = logits[row, expected] + 1e-4
        return logits, cache

    monkeypatch.setattr(session, "prefill", tied)
    half = check(session, reference, engine="ort", dtype="fp16")["generation"]
    full = check(session, reference, engine="ort", dtype="fp32")["generation"]
    assert half.passed and half.near_ties >= 1 and half.identical_token_ids == 10 - half.near_ties
    assert not full.passed and full.identical_token_ids == half.identical_token_ids
    assert f"{other} instead of {expected}" in full.message


def test_the_near_tie_rule_in_figures():
    tolerance = TOLERANCES["fp16"]
    assert Parted(0, 1, 2, margin=0.2, scale=10.0).is_near_tie(tolerance)
    assert not Parted(0, 1, 2, margin=0.21, scale=10.0).is_near_tie(tolerance)
    assert not Parted(0, 1, 2, margin=float("nan"), scale=10.0).is_near_tie(tolerance)
