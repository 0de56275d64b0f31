"""`--random-weights` as a user meets it: from a config alone to a bundle that says what it is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from hurry import HURRY
from safetensors import safe_open

from infoprune_export.errors import NotEnough
from infoprune_export.job import Job
from infoprune_export.material import Options
from infoprune_export.resolution import resolve

ROOT = Path(__file__).parent.parent
WHY = "the weights are random and have no accuracy"


@pytest.fixture(scope="module")
def shapes(small_model, tmp_path_factory) -> Path:
    """A model directory that holds a config and nothing else."""
    directory = tmp_path_factory.mktemp("shapes") / "small"
    directory.mkdir()
    shutil.copyfile(small_model / "config.json", directory / "config.json")
    return directory


@pytest.fixture(scope="module")
def made(run, shapes, tmp_path_factory):
    """A bundle of random weights, and what its run said."""
    out = tmp_path_factory.mktemp("made") / "out"
    done = run(shapes, "--random-weights", "--target", "ort", "--flops", "0.6", "--samples", "8", *HURRY, "--out", out)
    return out, done


def test_everything_says_that_the_weights_are_random(made):
    out, done = made
    assert "random weights" in done.stdout and "random weights in the shapes of" in done.stderr
    manifest, report = (json.loads((out / name).read_text()) for name in ("manifest.json", "report.json"))
    assert manifest["random_weights"] is True and report["random_weights"] is True
    assert manifest["source"]["id"] == "small (random weights)"
    assert "The weights are random" in (out / "report.html").read_text()
    card = (out / "README.md").read_text()
    assert "**The weights are random**" in card and "8 synthetic questions" in card and "base_model" not in card


def test_it_is_compressed_and_measured_but_for_its_accuracy(made):
    out, _ = made
    report = json.loads((out / "report.json").read_text())
    assert 0.55 < report["flops"]["achieved"] <= 0.6
    assert all(record["passed"] for record in report["numerics"].values())
    assert report["latency"]["ort"]["end_to_end"]["compressed"]["n"] > 0
    assert report["accuracy"] == {}
    assert {"what": "accuracy", "reason": WHY} in report["not_measured"]


def test_only_the_bundle_is_left(made):
    assert [p.name for p in made[0].parent.iterdir()] == ["out"]


def test_its_accuracy_is_refused_later_too(run, made):
    assert WHY in run("validate", made[0], "--max-drop", "1", code=2).stderr


def test_it_answers_something(run, made, picture):
    run("generate", made[0], "--image", picture, "--prompt", "w3 w5 w7", "--max-new-tokens", "3")


@pytest.mark.parametrize("option", [("--train-steps", "5"), ("--max-drop", "1"), ("--calibration", "data")])
def test_what_random_weights_cannot_do_is_refused(run, shapes, tmp_path, option):
    message = run(shapes, "--random-weights", *option, "--out", tmp_path / "out", code=2).stderr
    assert f"{option[0]} does not go with --random-weights" in message
    assert list(tmp_path.iterdir()) == []


def test_a_plan_takes_the_data_and_the_weights_from_nowhere(run, shapes, tmp_path):
    """The recipe's own data do not exist, and neither does any checkpoint."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"model: {shapes}\nflops: 0.7\nsamples: 8\nworkload: {{text_tokens: 16}}\ntrain_steps: 40\nmax_drop: 1\n"
        "calibration: [{path: no/such/data}]\nevaluation: {vqa: {path: nor/this}}\n"
    )
    run("plan", recipe, "--random-weights", "--out", tmp_path / "plan")
    assert {p.name for p in tmp_path.iterdir()} == {"mine.yaml", "plan"}
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert plan["source"]["id"].endswith("(random weights)") and 0.69 < plan["budget"]["predicted"] <= 0.7
    run("plan", recipe, "--random-weights", "--seed", "1", "--out", tmp_path / "other")
    assert json.loads((tmp_path / "other" / "plan.json").read_text())["source"]["sha256"] != plan["source"]["sha256"]


def test_a_dry_run_leaves_nothing(run, shapes, tmp_path):
    run(shapes, "--random-weights", "--flops", "0.7", "--samples", "8", "--dry-run", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_budget_leaves_nothing(run, shapes, tmp_path):
    out = tmp_path / "deep" / "out"
    assert "cannot be reached" in run(shapes, "--random-weights", "--flops", "0.03", "--samples", "8", "--out", out, code=2).stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_hub_only_packaged_shapes_are_known(run, tmp_path):
    message = run("someone/llava-9b", "--random-weights", "--out", tmp_path / "out", code=2, HF_HUB_OFFLINE="1", HF_HOME=tmp_path).stderr
    assert "someone/llava-9b: is not in the cache, and HF_HUB_OFFLINE is set" in message
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_the_disk_are_refused_before_they_are_made(run, shapes, tmp_path):
    config = json.loads((shapes / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 2, "vocab_size": 10**11, "layer_types": None}
    (tmp_path / "huge").mkdir()
    (tmp_path / "huge" / "config.json").write_text(json.dumps(config))
    assert "of disk" in run(tmp_path / "huge", "--random-weights", "--out", tmp_path / "out", code=4).stderr
    assert [p.name for p in tmp_path.iterdir()] == ["huge"]


def test_weights_that_are_there_need_no_disk_again(shapes, tmp_path, monkeypatch):
    def made(out):
        with suppress(KeyboardInterrupt), Job(recipe, Options(out=out, random_weights=True, device="cpu")) as job:
            _ = job.checkpoint
            raise KeyboardInterrupt

    recipe = resolve(str(shapes), {"random_weights": True})
    made(tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    made(tmp_path / "out")
    with pytest.raises(NotEnough, match="of disk"):
        made(tmp_path / "other")


def test_kill_9_then_the_same_command_goes_on(run, shapes, tmp_path):
    command = ["plan", shapes, "--random-weights", "--samples", "8", "--flops", "0.7", "--out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "infoprune_export", *map(str, command), str(tmp_path / "out")],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    index = tmp_path / ".out.random" / "model.safetensors.index.json"
    while process.poll() is None and not index.exists():
        time.sleep(0.02)
    process.kill()
    process.wait()
    with safe_open(index.with_name("model-00001-of-00001.safetensors"), "np") as f:
        assert len(list(f.keys())) > 10
    run(*command, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    run(*command, tmp_path / "straight")
    for name in ("plan.json", "factors.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
