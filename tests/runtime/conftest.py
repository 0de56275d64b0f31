"""A bundle with a toy network, and the tokenizer and image processor of the packaged model."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
from onnx import TensorProto
from toy_network import TOKENS, Toy

from infoprune_export.bundle import Bundle, Flops, Manifest
from infoprune_export.plans import Source
from infoprune_export.recipe import Recipe, Workload

MODEL = Path(str(resources.files("infoprune_export"))) / "models" / "tiny_llava"


@pytest.fixture(scope="session")
def toy() -> Toy:
    return Toy()


@pytest.fixture(scope="session")
def bundle_dir(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole bundle; do not write into it."""
    root = tmp_path_factory.mktemp("bundle")
    toy.write(root / "onnx")
    toy.write(root / "onnx", TensorProto.FLOAT16, "fp16")
    for file in MODEL.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, root)
    config = json.loads((root / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 160
    (root / "config.json").write_text(json.dumps(config))
    manifest = Manifest(
        tool="test",
        libraries={},
        source=Source(id="toy", sha256="0" * 64),
        recipe=Recipe(name="toy", model="toy"),
        workload=Workload(image_tokens=TOKENS),
        dtypes=["fp32", "fp16"],
        targets=["onnx"],
        flops=Flops(denominator="all", scope="all", requested=1, achieved=1, original=1, compressed=1, parts={}),
        files={},
    )
    Bundle(root, manifest).write_manifest()
    return root


@pytest.fixture
def bundle(bundle_dir: Path) -> Bundle:
    return Bundle.open(bundle_dir)
