"""A plan applied on its own: what stands at the output is whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from infoprune_export import application, requirements
from infoprune_export.errors import InputError, MissingRequirement
from infoprune_export.job import Job
from infoprune_export.material import Options
from infoprune_export.resolution import resolve


@pytest.mark.parametrize("route", ["model", "graphs"])
def test_an_interrupted_apply_leaves_nothing_and_can_be_repeated(route, bundle, small_model, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def apply():
        if route == "graphs":
            application.to_graphs(bundle / "plan.json", bundle, out)
        else:
            options = Options(out=out, plan=bundle / "plan.json", device="cpu")
            application.to_model(resolve(str(small_model), {}), options)

    def interrupt(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Job, "write_network", interrupt)
        patched.setattr(application.shutil, "copyfile", interrupt)
        apply()
    assert not list(tmp_path.iterdir())
    apply()
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (out / "plan.json").is_file()


def test_the_plan_that_is_kept_is_the_one_that_was_applied(bundle, tmp_path):
    """Whatever its name, and whatever lies beside it."""
    edited = tmp_path / "edited.json"
    shutil.copy(bundle / "factors.safetensors", tmp_path)
    edited.write_text((bundle / "plan.json").read_text() + " \n")
    (tmp_path / "plan.json").write_text("another")
    application.to_graphs(edited, bundle, tmp_path / "out")
    assert (tmp_path / "out" / "plan.json").read_text() == edited.read_text()


def test_an_output_that_cannot_be_written_is_refused_before_the_work(bundle, monkeypatch):
    monkeypatch.setattr(application.Bundle, "open", lambda path: pytest.fail("work was begun"))
    with pytest.raises(InputError, match="cannot be written"):
        application.to_graphs(bundle / "plan.json", bundle, Path("/proc/out"))


def test_without_graph_surgery_it_says_what_to_install(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    with pytest.raises(MissingRequirement, match=r"rewriting graphs needs onnx_graphsurgeon\npip install"):
        application.to_graphs(bundle / "plan.json", bundle, tmp_path / "out")
    assert not list(tmp_path.iterdir())
