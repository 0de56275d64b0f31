from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_network import Toy

from infoprune_export.data.images import ImageRef
from infoprune_export.errors import InputError
from infoprune_export.runtime.generate import generate
from infoprune_export.runtime.images import ImageProcessor
from infoprune_export.runtime.prompts import Prompts


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (50, 40, 3), np.uint8)).save(path)
    return paths


def expected(bundle_dir: Path, toy: Toy, pictures: list[Path], prompt: str, new: int) -> str:
    prompts = Prompts.from_directory(bundle_dir)
    ids = prompts.encode(prompt, images=len(pictures))
    pixels = ImageProcessor.from_directory(bundle_dir)([ImageRef(p).open() for p in pictures]) if pictures else None
    tokens = toy.greedy(ids, pixels, new).tolist()
    return prompts.decode(tokens[: tokens.index(432)] if 432 in tokens else tokens)


@pytest.mark.parametrize("images", [0, 1, 2])
def test_text_of_the_model(bundle_dir: Path, toy: Toy, pictures: list[Path], images: int) -> None:
    used = pictures[:images]
    pieces = list(generate(bundle_dir, used, "what shape?", engine="onnx", max_new_tokens=7, threads=1))
    assert len(pieces) > 1 and "".join(pieces) == expected(bundle_dir, toy, used, "what shape?", 7)


def test_an_image_token_of_ones_own_changes_nothing(bundle_dir: Path, pictures: list[Path]) -> None:
    answers = [
        "".join(generate(bundle_dir, pictures[:1], prompt, engine="onnx", max_new_tokens=5, threads=1))
        for prompt in ("what shape?", "<image>\nwhat shape?")
    ]
    assert answers[0] == answers[1]


def test_bad_input_is_refused_before_the_first_piece(bundle_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"x")
    with pytest.raises(InputError, match=r"broken\.png: does not decode as an image"):
        generate(bundle_dir, [broken], "what?", engine="onnx")
    with pytest.raises(InputError, match="has 2 image tokens"):
        generate(bundle_dir, [broken], "<image> <image>", engine="onnx")
    with pytest.raises(InputError, match="is not a bundle"):
        generate(tmp_path, [], "what?", engine="onnx")
    changed = tmp_path / "changed"
    shutil.copytree(bundle_dir, changed)
    (changed / "onnx" / "embed_tokens.onnx_data").write_bytes(b"x")
    with pytest.raises(InputError, match=r"embed_tokens\.onnx_data is not the file that was written"):
        generate(changed, [], "what?", engine="onnx")


def test_without_pytorch_and_transformers() -> None:
    modules = "infoprune_export.runtime.generate, infoprune_export.data.vqa, infoprune_export.engines.onnxruntime"
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "onnxruntime" in loaded and not {"torch", "transformers", "tensorrt"} & set(loaded)
