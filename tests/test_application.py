"""A plan applied on its own: what stands at the output is whole."""

from __future__ import annotations

import pytest

from infoprune_export import application
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
