"""What tests share: the command line in a subprocess, a two-layer model, and one bundle made of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # each has a core of its own
    os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parent))
from hurry import HURRY

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def run():
    """Runs the real command line: `run("inspect", path, code=2)` gives the finished process after checking its exit code."""

    def call(*args, code: int = 0, cwd: Path | None = None, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100", **environment}
        command = [sys.executable, "-m", "infoprune_export", *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=timeout, check=False)
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        if code in (1, 2, 3, 4):
            assert "Traceback" not in done.stderr
            message = done.stderr.partition("error: ")[2] or done.stderr.partition("Error: ")[2]
            assert 1 <= len(message.strip().splitlines()) <= 2, done.stderr
        return done

    return call


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """The embedded model cut to two layers a tower: real shapes and files, a fraction of the time."""
    from transformers import LlavaForConditionalGeneration

    source = ROOT / "infoprune_export" / "models" / "tiny_llava"
    directory = tmp_path_factory.mktemp("models") / "small"
    shutil.copytree(source, directory)
    model = LlavaForConditionalGeneration.from_pretrained(source)
    for stack, config in (
        (model.model.vision_tower.encoder, model.config.vision_config),
        (model.model.language_model, model.config.text_config),
    ):
        stack.layers = stack.layers[:2]
        config.num_hidden_layers = 2
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:2]
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def bundle(tmp_path_factory, run, small_model) -> Path:
    """A bundle of the small model at 0.6, portable and ONNX Runtime, with its original. Not to be changed: copy it."""
    recipe = tmp_path_factory.mktemp("recipes") / "small.yaml"
    recipe.write_text(
        f"model: {small_model}\n"
        "workload: {text_tokens: 16, new_tokens: 4}\n"
        "flops: 0.6\n"
        "samples: 24\n"
        "calibration: [{path: 'tiny:vqa', split: train}, {path: 'tiny:gqa', split: train}]\n"
        "evaluation: {vqa: {path: 'tiny:vqa', samples: 20}, gqa: {path: 'tiny:gqa', samples: 20}}\n"
    )
    out = tmp_path_factory.mktemp("bundles") / "small"
    run(recipe, "--target", "ort", *HURRY, "--out", out)
    return out


@pytest.fixture
def bundle_copy(bundle, tmp_path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def picture(tmp_path_factory) -> Path:
    from PIL import Image

    path = tmp_path_factory.mktemp("pictures") / "red.png"
    Image.new("RGB", (80, 64), (200, 30, 30)).save(path)
    return path
