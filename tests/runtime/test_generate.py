from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_network import Toy

from infoprune_export.bundle import COMPONENTS, Bundle, QuantisedWeights
from infoprune_export.data.images import ImageRef
from infoprune_export.engines import onnxruntime, tensorrt_run
from infoprune_export.errors import InputError, MissingRequirement
from infoprune_export.recipe import Workload
from infoprune_export.runtime.generate import generate
from infoprune_export.runtime.images import ImageProcessor
from infoprune_export.runtime.prompts import Prompts
from infoprune_export.runtime.session import first_held


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


@pytest.fixture
def quantised(bundle_dir: Path, tmp_path: Path) -> Bundle:
    """A bundle that has quantised graphs by its manifest, and ONNX Runtime engines of the half-precision network alone."""
    bundle = Bundle.open(shutil.copytree(bundle_dir, tmp_path / "quantised"))
    for component in COMPONENTS:
        graph = bundle.graph(component, "fp16")
        onnxruntime.build(graph, bundle.engines("ort") / graph.name)
    bundle.manifest.weights = QuantisedWeights(type="int4", block_size=32, components={})
    bundle.write_manifest()
    return bundle


def test_what_an_engine_was_not_built_in_is_passed_over(quantised: Bundle) -> None:
    assert [first_held(quantised, engine) for engine in ("ort", "onnx")] == ["fp16", "fp32"]
    assert "".join(generate(quantised.path, [], "what shape?", max_new_tokens=3, threads=1))
    (quantised.engines("ort") / "decoder_model_merged_fp16.onnx").unlink()
    quantised.write_manifest()
    with pytest.raises(InputError, match="has no vision_encoder for ort in q4"):
        generate(quantised.path, [], "what shape?", threads=1)


def test_tensorrt_engines_are_found_in_the_type_they_were_built_in(quantised: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    built = {"vision_encoder_int8f16", "embed_tokens", "decoder_model_merged_q4f16"}

    def find(engines: Path, name: str) -> Path:
        if name not in built:
            raise MissingRequirement("there is no such engine for this GPU")
        return engines / name

    monkeypatch.setattr(tensorrt_run, "find_engine", find)
    assert first_held(quantised, "trt") == "q4f16"


def test_an_answer_that_tensorrts_engines_have_no_room_for_is_not_begun(bundle_dir: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(bundle_dir, tmp_path / "b"))
    bundle.manifest.workload = Workload(images=0, image_tokens=0, text_tokens=30, new_tokens=4)  # engines for 64 tokens
    bundle.write_manifest()
    prompts = Prompts.from_directory(bundle.path)
    prompt = len(prompts.encode("what shape?", images=0))
    longer = next(text for n in range(60) if len(prompts.encode(text := "what shape? " * n, images=0)) > 64)
    room = 64 - prompt + 1
    ask = lambda prompt, new: generate(bundle.path, [], prompt, engine="trt", max_new_tokens=new)
    told = f"takes {prompt} tokens, its answer up to {room + 1}, .* built for 64\ngive --max-new-tokens {room}, or"
    with pytest.raises(InputError, match=told):
        ask("what shape?", room + 1)
    with pytest.raises(InputError, match="ask a shorter question, or make the bundle from a recipe with a longer workload"):
        ask(longer, 1)
    with pytest.raises(MissingRequirement):  # of a GPU
        ask("what shape?", room)


def test_without_pytorch_and_transformers() -> None:
    modules = "infoprune_export.runtime.generate, infoprune_export.data.vqa, infoprune_export.engines.onnxruntime"
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "onnxruntime" in loaded and not {"torch", "transformers", "tensorrt"} & set(loaded)
