from __future__ import annotations

import pytest
import yaml

from infoprune_export.bundle import Manifest
from infoprune_export.recipe import DataSource, Recipe
from infoprune_export.validation.card import code_span, model_card, plain


@pytest.fixture
def manifest(report) -> Manifest:
    return Manifest(
        tool="infoprune-export 0.1.0",
        libraries={},
        source=report.source,
        recipe=Recipe(name="tiny-llava", model="package:tiny_llava", calibration=[DataSource(path="/home/me/vqav2", split="train")]),
        workload=report.workload,
        dtypes=["fp32"],
        targets=["ort", "trt"],
        flops=report.flops,
        files={},
    )


def header(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_figures_and_honest_words(manifest, plan, report):
    card = model_card(manifest, plan, report, licence="apache-2.0")
    assert header(card) == {
        "license": "apache-2.0",
        "base_model": "tiny/llava",
        "library_name": "infoprune-export",
        "pipeline_tag": "image-text-to-text",
        "tags": ["onnx", "tensorrt", "pruning", "low-rank", "vision-language"],
    }
    for text in (
        "| vision tower | 2 | 4 of 6 | 4 of 6 | 2 of 4 |",
        "0.925 (0.895 to 0.947) | -2.5 |",
        "12.0 MB before",
        "not tested for",
        "training | none",
    ):
        assert text in card


def test_it_says_what_it_was_calibrated_on_but_not_where_that_lay(manifest, plan, report):
    card = model_card(manifest, plan, report)
    assert "| calibration | 64 questions of `vqav2 (train)` |" in card and "/home" not in card


def test_only_what_was_done_is_claimed(manifest, plan, report):
    assert "attention heads were removed and feed-forward matrices were replaced" in model_card(manifest, plan, report)
    for decision in plan.layers:
        decision.ranks = dict.fromkeys(decision.ranks)
    card = model_card(manifest, plan, report)
    assert "attention heads were removed, then" in card and "were replaced" not in card


def test_no_times_so_that_the_same_inputs_give_the_same_bytes(manifest, plan, report):
    card = model_card(manifest, plan, report)
    report.latency, report.machine, report.measured_at = {}, {"cpu": "another"}, "2030-01-01T00:00:00Z"
    assert model_card(manifest, plan, report) == card
    assert " ms" not in card and "speed-up" not in card


def test_an_unknown_licence_and_a_local_source(manifest, plan, report):
    manifest.source.id = "package:tiny_llava"
    card = model_card(manifest, plan, report)
    assert "license" not in header(card) and "base_model" not in header(card) and "not stated by the source" in card


def test_strings_cannot_leave_their_place(manifest, plan, report):
    manifest.source.id = "a`b|c\n---\nlicense: evil"
    manifest.recipe.name = "<script>|x\n# heading"
    card = model_card(manifest, plan, report, licence='"quoted": [x')
    assert header(card)["license"] == '"quoted": [x'
    assert "<script>" not in card and "\n# heading" not in card and "evil`" in card
    assert code_span("a`b\nc|d") == "`a'b c/d`" and plain("a*b_c") == r"a\*b\_c"


def test_an_export_without_compression_says_so(manifest, plan, report):
    for decision, layer in zip(plan.layers, plan.anatomy.layers(), strict=True):
        decision.heads, decision.kv_groups = list(range(layer.attention.heads)), list(range(layer.attention.kv_groups))
        decision.ranks = dict.fromkeys(decision.ranks)
    assert "Nothing was removed." in model_card(manifest, plan, report)
