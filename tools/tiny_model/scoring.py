"""Exact-match accuracy of packed questions, and the question-only baseline."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import islice

import torch
from tiny_data import easy_shapes, splits
from tiny_data.sample import Sample, stream
from transformers import LlavaForConditionalGeneration

from tiny_model.packing import Encoder, answer_logits, correct, pack

_BASELINE_IMAGES = 4000


def _batches(samples: Iterable[Sample], size: int):
    samples = iter(samples)
    while batch := list(islice(samples, size)):
        yield batch


@torch.no_grad()
def accuracy(model: LlavaForConditionalGeneration, encoder: Encoder, samples: Iterable[Sample], batch_size: int = 32) -> dict[str, dict]:
    """Returns `{kind: {"accuracy", "n"}}`, with `all` first.

    Word images add `seen words` and `unseen words` (whole-word questions only).
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    hits: dict[str, list[int]] = defaultdict(list)
    hits["all"] = []
    for batch in _batches(samples, batch_size):
        packed = pack(encoder, batch).to(device)
        right = correct(*answer_logits(model, packed), packed).tolist()
        asked = [(sample, question) for sample in batch for question in sample.questions]
        for (sample, question), hit in zip(asked, right, strict=True):
            hits["all"].append(hit)
            hits[question.kind].append(hit)
            if question.kind == "word" and "unseen_word" in sample.info:
                hits["unseen words" if sample.info["unseen_word"] else "seen words"].append(hit)
    model.train(was_training)
    return {kind: {"accuracy": sum(h) / len(h), "n": len(h)} for kind, h in hits.items()}


def baseline(task: str, samples: Iterable[Sample]) -> float:
    """Returns the accuracy of the most frequent training answer per question.

    A question that training does not hold gets the most frequent answer of its
    kind.
    """
    by_text: dict[str, Counter] = defaultdict(Counter)
    by_kind: dict[str, Counter] = defaultdict(Counter)
    if task == "vqa":
        seen = (easy_shapes.sample("train", i) for i in easy_shapes.image_ids("train"))
    else:
        seen = (splits.training_sample(task, stream("baseline", task, i)) for i in range(_BASELINE_IMAGES))
    for sample in seen:
        for question in sample.questions:
            by_text[question.text][question.answer] += 1
            by_kind[question.kind][question.answer] += 1
    hits = []
    for sample in samples:
        for question in sample.questions:
            known = by_text.get(question.text) or by_kind[question.kind]
            hits.append(known.most_common(1)[0][0] == question.answer)
    return sum(hits) / len(hits)
