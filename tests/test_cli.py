"""The command line before any heavy work: help, speed of light, and bad input refused in a line or two."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def test_help_names_every_verb_and_imports_nothing_heavy(run):
    text = run("--help").stdout
    for verb in ("export", "plan", "apply", "build", "validate", "bench", "generate", "inspect", "recipes", "doctor"):
        assert f"  {verb} " in text
    heavy = "('torch', 'transformers', 'onnx', 'onnxruntime', 'pydantic')"
    code = f"import sys, infoprune_export, infoprune_export.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("verb", ["export", "plan", "apply", "build", "validate", "bench", "generate", "inspect", "recipes", "doctor"])
def test_every_verb_has_help(run, verb):
    assert run(verb, "--help").stdout.startswith(f"Usage: infoprune-export {verb}")


def test_recipes_are_listed(run):
    assert set(json.loads(run("recipes", "--json").stdout)) >= {"llava", "tiny-llava"}
    assert "llava-hf/llava-1.5-7b-hf" in run("recipes").stdout


def test_doctor_says_what_this_machine_can_do(run):
    assert "onnxruntime" in run("doctor").stdout.lower()
    assert json.loads(run("doctor", "--json").stdout)


def test_unknown_recipe_suggests_near_names(run, tmp_path):
    assert "did you mean tiny-llava" in run("tiny-lava", code=2, cwd=tmp_path).stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flops", ["0", "-1", "nan", "1.01", "inf", "half"])
def test_flops_must_be_a_fraction_kept(run, flops):
    assert "--flops" in run("tiny-llava", "--flops", flops, code=2).stderr


def test_directory_that_is_no_model(run, tmp_path):
    assert "is not a model directory (no config.json)" in run(tmp_path, "--out", tmp_path / "out", code=2).stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def model_copy(small_model, tmp_path):
    from pathlib import Path

    return Path(shutil.copytree(small_model, tmp_path / "model"))


def refused(run, model, tmp_path):
    """Exports a model that must be refused without a trace; returns the message."""
    message = run(model, "--out", tmp_path / "new" / "out", code=2).stderr
    assert not (tmp_path / "new").exists()
    return message


def test_unknown_family_names_the_known(run, model_copy, tmp_path):
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    assert "families known: llava" in refused(run, model_copy, tmp_path)


def test_config_that_is_not_json(run, model_copy, tmp_path):
    (model_copy / "config.json").write_text("{")
    assert "config.json: not JSON" in refused(run, model_copy, tmp_path)


def test_truncated_weights(run, model_copy, tmp_path):
    weights = model_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is not a whole safetensors file" in refused(run, model_copy, tmp_path)


def test_weights_of_another_shape(run, model_copy, tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model_copy / "model.safetensors")
    name = next(n for n in tensors if "layers.1.mlp.up_proj.weight" in n)
    tensors[name] = tensors[name][:-1].copy()
    save_file(tensors, model_copy / "model.safetensors", metadata={"format": "pt"})
    assert "up_proj" in refused(run, model_copy, tmp_path)


def test_missing_tensors(run, model_copy, tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model_copy / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "q_proj" not in k}, model_copy / "model.safetensors", metadata={"format": "pt"})
    assert "tensors do not fit the config (missing: " in refused(run, model_copy, tmp_path)


def test_pickle_weights_are_refused(run, model_copy, tmp_path):
    (model_copy / "model.safetensors").rename(model_copy / "pytorch_model.bin")
    assert "has pickle weights only (pytorch_model.bin)" in refused(run, model_copy, tmp_path)


def test_misspelt_recipe_names_line_and_field(run, tmp_path):
    (tmp_path / "r.yaml").write_text("model: m\nflosp: 1\n")
    assert "r.yaml: line 2: flosp: unknown field; did you mean flops?" in run(tmp_path / "r.yaml", code=2).stderr


def test_output_that_is_no_bundle_is_never_overwritten(run, small_model, tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    assert "is not a bundle; it is never overwritten" in run(small_model, "--out", tmp_path, code=2).stderr
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_output_that_cannot_be_written(run, small_model):
    assert "cannot be written" in run(small_model, "--out", "/proc/nowhere/out", code=2).stderr


def test_calibration_with_missing_fields_names_record_and_field(run, small_model, tmp_path):
    path = tmp_path / "TextVQA_0.5.1_train.json"
    path.write_text(json.dumps({"data": [{"question": "what?", "question_id": 1, "answers": ["x"] * 10}]}))
    message = run(small_model, "--flops", "0.6", "--calibration", path, "--out", tmp_path / "out", code=2).stderr
    assert "TextVQA_0.5.1_train.json" in message
    assert "image_id" in message
    assert not (tmp_path / "out").exists()


def test_unreachable_budget_says_what_is_reachable(run, small_model, tmp_path):
    message = run(small_model, "--flops", "0.05", "--samples", "8", "--out", tmp_path / "out", code=2).stderr
    assert "cannot be reached" in message
    assert "ask for --flops 0." in message
    assert list(tmp_path.iterdir()) == []


def test_architectures_this_machine_cannot_build_for(run, small_model, tmp_path):
    assert "sm87" in run(small_model, "--target", "trt", "--gpu-arch", "sm87", "--out", tmp_path / "out", code=3).stderr
    assert list(tmp_path.iterdir()) == []


def test_dry_run_writes_nothing(run, small_model, tmp_path):
    plan = json.loads(run(small_model, "--flops", "0.7", "--samples", "8", "--dry-run", "--json", cwd=tmp_path).stdout)
    assert 0.69 < plan["budget"]["predicted"] <= 0.7
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["tiny-llava"], "error: interrupted; the same command goes on from here\n"),
        (["export", "tiny-llava"], "error: interrupted; the same command goes on from here\n"),
        (["plan", "tiny-llava"], "error: interrupted; the same command goes on from here\n"),
        (["tiny-llava", "--dry-run"], "error: interrupted\n"),
        (["tiny-llava", "--no-resume"], "error: interrupted\n"),
        (["bench", "build/x"], "error: interrupted\n"),
    ],
)
def test_an_interrupted_command_says_whether_it_goes_on(args, said, monkeypatch, capsys):
    from infoprune_export.cli import entry

    def interrupt(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(entry.cli, "main", interrupt)
    with pytest.raises(SystemExit) as ended:
        entry.main([*args, "-v"])  # else warnings and logging would be off for the tests that follow
    assert ended.value.code == 130 and capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
    ],
)
def test_a_full_disk_is_told_by_every_verb(error, said, monkeypatch, capsys):
    from infoprune_export.cli import entry

    def fill(*given, **named):
        raise error

    monkeypatch.setattr(entry.cli, "main", fill)
    with pytest.raises(SystemExit) as ended:
        entry.main(["build", "x", "-v"])
    assert ended.value.code == 4
    assert capsys.readouterr().err == f"error: {said}, or a file may not grow further\nmake space and run the same command again\n"


def test_a_reader_that_is_gone_is_no_failed_gate():
    command = f"{sys.executable} -m infoprune_export recipes --json | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        check=True,
    )
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_a_seed_below_zero(run, small_model, tmp_path):
    assert "--seed" in run(small_model, "--seed", "-1", "--out", tmp_path / "out", code=2).stderr


def test_calibration_on_a_packaged_set(run, small_model, tmp_path):
    asked = ("--flops", "0.7", "--samples", "4", "--calibration", "tiny:vqa")
    plan = json.loads(run(small_model, *asked, "--dry-run", "--json", cwd=tmp_path).stdout)
    assert plan["budget"]["predicted"] <= 0.7
