"""Packed rows, against every question in a sequence of its own."""

import numpy as np
import pytest
import torch
from networks import IMAGE_TOKEN, IMAGE_TOKENS, LANGUAGE, build

from infoprune_export.compress.packing import IGNORE, make_rows, pack

IMAGE = np.full(IMAGE_TOKENS, IMAGE_TOKEN)


def question(*text, answer=(7, 2)):
    return np.concatenate([[1], IMAGE, text]).astype(np.int64), np.array(answer, np.int64)


def picture(seed):
    pixels = np.random.default_rng(seed).standard_normal((1, 3, 16, 16)).astype(np.float32)
    return lambda: pixels


IMAGES = [
    (picture(0), [question(5, 9, 4), question(5, 8, 6, 3, answer=(11, 12, 2)), question(5, 3)]),
    (picture(1), [question(6)]),
    (picture(2), [question(30, 31), question(40, 41, 42, 43, 44)]),
]


def answer_logits(model, packed):
    """Logits at the positions with a target, question by question, in order."""
    logits = model(**packed.inputs, use_cache=False).logits
    wanted = packed.targets != IGNORE
    order = packed.owners[wanted].sort(stable=True).indices
    return logits[wanted][order], packed.targets[wanted][order]


@pytest.mark.parametrize("language", LANGUAGE)
def test_logits_are_those_of_separate_sequences(language):
    model = build(language=language)
    together = pack(make_rows(IMAGES, image_token=IMAGE_TOKEN))
    assert together.inputs["pixel_values"].shape[0] == 3
    apart = [pack([row]) for row in make_rows(IMAGES, image_token=IMAGE_TOKEN, window=1)]
    logits, targets = answer_logits(model, together)
    separate = [answer_logits(model, p) for p in apart]
    assert torch.equal(targets, torch.cat([t for _, t in separate]))
    torch.testing.assert_close(logits, torch.cat([x for x, _ in separate]), rtol=1e-4, atol=1e-4)


def test_a_row_sees_its_prefix_and_itself():
    (row, *_) = make_rows(IMAGES, image_token=IMAGE_TOKEN)
    prefix = 1 + IMAGE_TOKENS + 1  # all three questions begin with 5
    assert row.ids.tolist() == [1, *IMAGE, 5, 9, 4, 7, 2, 8, 6, 3, 11, 12, 2, 3, 7, 2]
    assert row.positions.tolist() == [*range(prefix), *range(prefix, prefix + 4), *range(prefix, prefix + 6), *range(prefix, prefix + 3)]
    assert row.owners[prefix:].tolist() == [0] * 4 + [1] * 6 + [2] * 3
    assert row.targets[prefix:].tolist() == [IGNORE, 7, 2, IGNORE, IGNORE, IGNORE, 11, 12, 2, IGNORE, 7, 2, IGNORE]
    seen = pack([row]).inputs["attention_mask"][0, 0]
    assert seen[prefix + 5, prefix + 4] and not seen[prefix + 5, prefix + 3] and not seen[prefix + 5, prefix + 6]
    assert seen[prefix:, :prefix].all()


def test_an_image_behind_the_question_is_not_shared():
    late = [(np.concatenate([[1, 5 + i], IMAGE]).astype(np.int64), np.array([7, 2])) for i in range(3)]
    assert [len(r.ids) for r in make_rows([(picture(0), late)], image_token=IMAGE_TOKEN)] == [IMAGE_TOKENS + 4] * 3


def test_a_prompt_that_ends_with_its_image_learns_its_whole_answer():
    prompt, answer = np.concatenate([[1, 5], IMAGE]).astype(np.int64), np.array([7, 2])
    (row,) = make_rows([(picture(0), [(prompt, answer)])], image_token=IMAGE_TOKEN)
    assert row.targets[-3:].tolist() == [7, 2, IGNORE]
    assert make_rows([(picture(0), [(prompt, np.array([], np.int64))])], image_token=IMAGE_TOKEN) == []  # nothing to learn


def test_long_rows_are_split(monkeypatch):
    monkeypatch.setattr("infoprune_export.compress.packing.LONGEST_ROW", 12)
    rows = make_rows(IMAGES[:1], image_token=IMAGE_TOKEN)
    assert [int(r.owners.max()) + 1 for r in rows] == [2, 1]


def test_without_an_answer_the_text_is_learned():
    (row,) = make_rows([(picture(0), [question(5, 9, 4, answer=())])], image_token=IMAGE_TOKEN)
    assert not row.answered
    assert row.targets.tolist() == [IGNORE] * (1 + IMAGE_TOKENS) + [9, 4, IGNORE]


def test_text_without_an_image_packs_too():
    rows = make_rows([(None, [(np.array([1, 4, 5]), np.array([2])), (np.array([1, 4, 6]), np.array([2]))])], image_token=IMAGE_TOKEN)
    packed = pack(rows)
    assert "pixel_values" not in packed.inputs
    model = build()
    logits, _ = answer_logits(model, packed)
    alone = model(input_ids=torch.tensor([[1, 4, 6]])).logits[0, -1]
    torch.testing.assert_close(logits[1], alone, rtol=1e-4, atol=1e-4)


def test_sequences_that_a_sliding_window_cuts_stay_apart():
    """Mistral's window is in its own mask, so only rows of one question may be longer."""
    longest = 1 + IMAGE_TOKENS + 4 + 3
    assert len(make_rows(IMAGES[:1], image_token=IMAGE_TOKEN, window=longest)) == 1
    apart = make_rows(IMAGES[:1], image_token=IMAGE_TOKEN, window=longest - 1)
    assert len(apart) == 3
    assert pack(apart).inputs["attention_mask"].ndim == 2


def test_a_window_that_cuts_nothing_changes_nothing():
    model, windowed = build(language="mistral"), build(language="mistral")
    windowed.config.text_config.sliding_window = windowed.model.language_model.config.sliding_window = 24
    packed = pack(make_rows(IMAGES, image_token=IMAGE_TOKEN, window=24))
    torch.testing.assert_close(answer_logits(model, packed)[0], answer_logits(windowed, packed)[0])
