"""A bundle of toy graphs; makes the modules of this directory importable from its tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def bundle(tmp_path):
    """A bundle of toy graphs in fp32 and fp16, with an `original/` in fp32."""
    from toy_graphs import write_graphs

    from infoprune_export.bundle import Bundle, Flops, Manifest
    from infoprune_export.plans import Source
    from infoprune_export.recipe import Recipe, Workload

    root = tmp_path / "bundle"
    for dtype in ("fp32", "fp16"):
        write_graphs(root, dtype)
    write_graphs(root / "original")
    flops = Flops(denominator="toy", scope="all", requested=1, achieved=1, original=1, compressed=1, parts={})
    manifest = Manifest(
        tool="test",
        libraries={},
        source=Source(id="toy", sha256="0"),
        recipe=Recipe(name="toy", model="toy"),
        workload=Workload(image_tokens=4, text_tokens=8, new_tokens=4),
        dtypes=["fp32", "fp16"],
        targets=["onnx"],
        flops=flops,
        files={},
    )
    bundle = Bundle(root, manifest)
    bundle.write_manifest()
    return bundle
