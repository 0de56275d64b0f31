"""The main job with training, through the real command line: what the bundle carries, resumed runs, refusals."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hurry import HURRY

from infoprune_export.bundle import Bundle, hash_tree
from infoprune_export.plans import Plan

ROOT = Path(__file__).parent.parent
STEPS, HEAD_STEPS = 4, 2


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_model) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "trained.yaml"
    path.write_text(
        f"model: {small_model}\n"
        "workload: {text_tokens: 16, new_tokens: 4}\n"
        "flops: 0.45\n"
        "samples: 24\n"
        f"train_steps: {STEPS + HEAD_STEPS}\n"
        "recovery: {batch: 4, head_share: 0.33}\n"
        "targets: [onnx]\n"
        "calibration: [{path: 'tiny:vqa', split: train}]\n"
        "training: [{path: 'tiny:vqa', split: train}, {path: 'tiny:textvqa', split: train}]\n"
        "validation: [{path: 'tiny:val/vqa', samples: 12}]\n"
        "evaluation: {vqa: {path: 'tiny:vqa', samples: 20}}\n"
    )
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run, recipe) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "trained"
    run(recipe, *HURRY, "--out", out, "--threads", 1)
    return out


def test_plan_card_and_inspect_say_how_it_was_trained(run, trained):
    training = Plan.load(trained).training
    said = str(training)
    assert said.startswith(f"{HEAD_STEPS} steps for the choice of heads, then {STEPS} steps on {training.images} images with ")
    assert " questions of tiny:vqa, tiny:textvqa" in said
    assert training.rate > 0 and training.kept in range(STEPS + 1)
    assert f"| training | {said} |" in (trained / "README.md").read_text()
    assert f"trained: {said}" in " ".join(run("inspect", trained / "plan.json").stdout.split())
    assert (training.head_steps, training.steps) == (HEAD_STEPS, STEPS)
    assert training.data == ["tiny:vqa", "tiny:textvqa"]
    assert 0 < training.images <= 4 * (STEPS + HEAD_STEPS) < training.questions
    report = json.loads((trained / "report.json").read_text())
    assert report["gates"]["numerics"]["passed"]
    took = report["resources"]["parts"]
    assert set(took) == {"calibration", "algebra", "training", "files"} and took["training"] > 0
    assert " without training" in (trained / "report.html").read_text()
    assert not list(trained.rglob("*.checkpoint"))


def test_plan_and_factors_carry_the_training_to_weights_and_graphs(run, trained, small_model, tmp_path):
    run("apply", trained / "plan.json", "--to", small_model, "--out", tmp_path / "weights")
    weights = "model/model.safetensors"
    assert (tmp_path / "weights" / weights).read_bytes() == (trained / weights).read_bytes()
    run("apply", trained / "plan.json", "--to", trained, "--out", tmp_path / "graphs")
    for file in (trained / "onnx").iterdir():
        assert (tmp_path / "graphs" / "onnx" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_trained_plan_without_its_factors_says_what_it_makes_instead(run, trained, small_model, tmp_path):
    plan = json.loads((trained / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "factors_sha256": None}))
    done = run("apply", tmp_path / "plan.json", "--to", small_model, "--out", tmp_path / "out", "--calibration", packaged("vqa"))
    assert f"the plan's factors were trained ({STEPS} steps) and are not here: making training-free ones" in done.stderr
    assert Plan.load(tmp_path / "out").training is None


def packaged(name: str) -> Path:
    return ROOT / "infoprune_export" / "data" / "tiny" / name / "v2_OpenEnded_mscoco_train2014_questions.json"


def test_low_budgets_without_training_are_warned_about(run, recipe, tmp_path):
    text = recipe.read_text().replace(f"train_steps: {STEPS + HEAD_STEPS}", "train_steps: 0").replace("flops: 0.45", "flops: 0.01")
    (tmp_path / "low.yaml").write_text(text)
    done = run(tmp_path / "low.yaml", "--out", tmp_path / "out", code=2)
    assert "keeping 0.01 of the FLOPs without training costs accuracy; --train-steps" in done.stderr
    assert "without training" not in run(recipe, "--flops", 0.01, "--out", tmp_path / "out", code=2).stderr
    assert [p.name for p in tmp_path.iterdir()] == ["low.yaml"]


def test_a_device_that_is_not_there(run, recipe, tmp_path):
    done = run(recipe, "--device", "cuda:7", "--out", tmp_path / "out", code=3)
    assert "--device cuda:7: PyTorch sees" in done.stderr
    assert "no device 'gpu'" in run(recipe, "--device", "gpu", "--out", tmp_path / "out", code=2).stderr
    assert not list(tmp_path.iterdir())


def test_misspelt_fields_of_recovery_are_named(run, recipe, tmp_path):
    (tmp_path / "bad.yaml").write_text(recipe.read_text().replace("{batch: 4,", "{bach: 4,"))
    assert "line 6: recovery.bach: unknown field; did you mean batch?" in run(tmp_path / "bad.yaml", code=2).stderr


def command(recipe: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "infoprune_export", str(recipe), "--threads", "1", "--out", str(out)]


@pytest.mark.slow
def test_a_run_killed_while_it_trains_goes_on_to_the_same_bundle(trained, recipe, tmp_path):
    process = subprocess.Popen(command(recipe, tmp_path / "out"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if list(tmp_path.glob(".out.work-*/stages/compress")):
            time.sleep(1)
            process.kill()
        time.sleep(0.02)
    assert not (tmp_path / "out").exists()
    assert subprocess.run(command(recipe, tmp_path / "out"), cwd=ROOT, capture_output=True, check=False).returncode == 0
    expected, got = hash_tree(trained), hash_tree(tmp_path / "out")
    assert {name for name in got if got[name] != expected[name]} <= {"README.md"}


@pytest.mark.slow
def test_two_processes_train_together(run, trained, recipe, tmp_path):
    """As `accelerate launch` starts them on a machine with two devices; here they share the CPU."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "-m"]
    rest = ["infoprune_export", str(recipe), "--threads", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    done = subprocess.run([*launch, *rest], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    together, alone = Bundle.open(tmp_path / "out").plan(), Plan.load(trained)
    assert together.training == alone.training
    assert done.stderr.count("recovery") == 1
