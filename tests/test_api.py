"""The Python interface, used as the README shows it."""

import pytest
from hurry import SECONDS

import infoprune_export as ip
from infoprune_export.errors import InputError


def test_plan_apply_export_validate_load(small_model, tmp_path):
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    plan = ip.plan(small_model, flops=0.7, samples=12, train_steps=2, device="cpu")
    assert "0.7 asked" in str(plan) and plan.training.steps == 2
    plan.save(tmp_path / "plan")
    model = LlavaForConditionalGeneration.from_pretrained(small_model, dtype=torch.float32)
    before = sum(p.numel() for p in model.parameters())
    small = ip.apply(model, type(plan).load(tmp_path / "plan"))
    assert sum(p.numel() for p in small.parameters()) < before == sum(p.numel() for p in model.parameters())
    bundle = ip.export(small, AutoProcessor.from_pretrained(small_model), tmp_path / "bundle", targets=["onnx"], seconds=SECONDS)
    assert bundle.manifest.source == plan.source
    report = ip.validate(tmp_path / "bundle", seconds=SECONDS)
    assert report.passed
    assert any("original" in x.what for x in report.not_measured)
    again = ip.load(tmp_path / "bundle")
    assert all(torch.equal(p, dict(small.named_parameters())[n]) for n, p in again.named_parameters())


def test_a_model_without_a_plan_is_not_exported(small_model, tmp_path):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(small_model)
    with pytest.raises(InputError, match="has no plan attached"):
        ip.export(model, AutoProcessor.from_pretrained(small_model), tmp_path / "bundle")


def test_what_is_no_bundle_is_not_loaded(tmp_path):
    with pytest.raises(InputError, match="holds no compressed model"):
        ip.load(tmp_path)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"flops": 60}, "flops: Input should be less than or equal to 1"),
        ({"scope": "visual"}, "scope: Input should be"),
        ({"samples": 0}, "samples: "),
    ],
)
def test_arguments_are_checked_as_options_are(given, said):
    with pytest.raises(InputError, match=said):
        ip.plan("tiny-llava", **given)
