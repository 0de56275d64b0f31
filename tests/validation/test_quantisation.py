"""What quantised weights do to a network, told apart from what an engine does."""

from dataclasses import replace

import numpy as np
import pytest

from infoprune_export.validation import accuracy, quantisation
from infoprune_export.validation.quantisation import distance, float_answers


@pytest.fixture
def answers(session, monkeypatch, tmp_path):
    """`float_answers` of a bundle whose unoptimised graphs are the fake session."""
    from types import SimpleNamespace

    monkeypatch.setattr(quantisation.OrtEngine, "open", classmethod(lambda cls, *a, **k: opened.append(k)))
    monkeypatch.setattr(quantisation, "Session", lambda engines, config: session)
    monkeypatch.setattr(quantisation.ModelConfig, "from_directory", classmethod(lambda cls, path: session.config))
    opened = []
    bundle = SimpleNamespace(path=tmp_path, graph=lambda component, precision: tmp_path / f"{component}_{precision}.onnx")
    return lambda reference: (float_answers(bundle, "q4", reference), opened)


def test_the_same_network_answers_as_the_reference_says(answers, reference):
    """Ends of sequence included, and prompts in their order although they are answered in batches by length."""
    found, opened = answers(reference)
    assert [k["optimise"] for k in opened] == [False] * 3
    for a, b in zip(found.generated, reference.generated, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(found.image_features, reference.image_features, rtol=1e-6)
    np.testing.assert_allclose(found.inputs_embeds, reference.inputs_embeds, rtol=1e-6)
    np.testing.assert_allclose(found.logits, reference.logits, rtol=1e-5, atol=1e-5)
    apart, alike = distance(found, reference)
    assert alike == len(reference.prompts) and all(d.max_rel < 1e-5 and d.cosine > 0.99999 for d in apart.values())


def test_distance_is_relative_to_the_float_network(reference):
    generated = list(reference.generated)
    generated[3] = generated[3] + 1
    other = replace(reference, logits=1.25 * reference.logits, generated=tuple(generated))
    apart, alike = distance(other, reference)
    assert apart["decoder_model_merged"].max_rel == pytest.approx(0.25)
    assert apart["decoder_model_merged"].cosine == pytest.approx(1)
    assert apart["vision_encoder"].max_rel == 0
    assert alike == len(generated) - 1


def test_accuracy_of_three_networks_on_the_same_questions():
    original, compressed, quantised = [1, 1, 1, 0.0], [1, 1, 0, 0.0], [1, 0, 0, 0.0]
    made = accuracy.record(original, compressed, quantised, metric="accuracy", engine="ort", dtype="fp32")
    assert (made.original, made.compressed, made.quantised) == (0.75, 0.5, 0.25)
    assert (made.drop_points, made.quantised_drop_points, made.final_drop_points) == (25, 50, 50)
    assert made.quantised_interval.low < 0.25 < made.quantised_interval.high
    alone = accuracy.record(None, compressed, quantised, metric="accuracy", engine="ort", dtype="fp32")
    assert alone.quantised == 0.25 and alone.final_drop_points is None
