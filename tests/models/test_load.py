"""Checkpoints on disk, before and while they are loaded."""

from __future__ import annotations

import pytest

from infoprune_export.errors import NotEnough
from infoprune_export.memory import Memory
from infoprune_export.models import load, streamed


def test_parameters_are_counted_in_the_files(small_model):
    source = load.locate(str(small_model))
    model = source.load_model()
    assert source.parameters == sum(p.numel() for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_a_model_that_does_not_fit_is_told_before_it_is_loaded(small_model, monkeypatch):
    source = load.locate(str(small_model))
    needed = 12 * source.parameters  # original and compressed in fp32, and room to work
    monkeypatch.setattr(load, "memory", lambda: Memory(10**12, needed - 1))
    with pytest.raises(NotEnough, match=r"needs about .* GiB of memory \(.* billion parameters in fp32, three times\)") as refused:
        source.load_model()
    assert refused.value.exit_code == 4
    monkeypatch.setattr(load, "memory", lambda: Memory(10**12, needed))
    assert source.load_model() is not None


def test_what_goes_to_a_gpu_needs_no_main_memory(small_model, monkeypatch):
    monkeypatch.setattr(load, "memory", lambda: Memory(10**12, 0))
    monkeypatch.setattr(load.SourceModel, "open_model", lambda source, device: device)
    monkeypatch.setattr(streamed, "load_all", lambda model: model)
    assert load.locate(str(small_model)).load_model("cuda:1") == "cuda:1"
