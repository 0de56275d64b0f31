import json
import os

import pytest

from infoprune_export.bundle import COMPONENTS, Bundle
from infoprune_export.engines import build as build_module
from infoprune_export.engines import flavours, onnxruntime
from infoprune_export.engines.build import build_bundle, build_into, check_target
from infoprune_export.errors import InputError, MissingRequirement
from infoprune_export.progress import Silent

TRT_FILES = {f"engines/trt/tensorrt-rtx/{{arch}}/{c}.{suffix}" for c in COMPONENTS for suffix in ("engine", "log")}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(flavours, "gpus", lambda: [])


def trt_files(arch):
    return {name.format(arch=arch) for name in TRT_FILES}


def snapshot(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_engines_of_both_networks_and_the_manifest(bundle):
    built = build_bundle(bundle.path, "ort")
    assert [p.relative_to(bundle.path).as_posix() for p in built] == [f"engines/ort/{c}.onnx" for c in COMPONENTS]
    after = Bundle.open(bundle.path)
    assert after.manifest.targets == ["onnx", "ort"]
    assert {f"original/engines/ort/{c}.onnx" for c in COMPONENTS} <= set(after.manifest.files)
    assert not list(bundle.path.parent.glob(".*"))


def test_tensorrt_takes_the_half_precision_graphs(bundle):
    pytest.importorskip("tensorrt_rtx_bindings")
    built = build_bundle(bundle.path, "trt", archs=["8.6"], original=False)
    assert [p.relative_to(bundle.path).as_posix() for p in built] == [f"engines/trt/tensorrt-rtx/sm86/{c}.engine" for c in COMPONENTS]
    files = set(Bundle.open(bundle.path).manifest.files)
    assert trt_files("sm86") <= files
    log = built[0].with_suffix(".log").read_text()
    assert "vision_encoder_fp16.onnx" in log


def test_engines_of_other_targets_and_architectures_stay(bundle):
    pytest.importorskip("tensorrt_rtx_bindings")
    build_bundle(bundle.path, "ort", original=False)
    build_bundle(bundle.path, "trt", archs=["sm86"], original=False)
    before = snapshot(bundle.path / "engines")
    build_bundle(bundle.path, "trt", archs=["sm89"], original=False)
    after = Bundle.open(bundle.path)
    assert trt_files("sm86") | trt_files("sm89") | {"engines/ort/embed_tokens.onnx"} <= set(after.manifest.files)
    assert before.items() <= snapshot(bundle.path / "engines").items()
    assert after.manifest.targets == ["onnx", "ort", "trt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MissingRequirement("no")])
def test_an_interrupted_build_leaves_the_bundle_as_it_was(bundle, monkeypatch, error):
    build_bundle(bundle.path, "ort")
    before = snapshot(bundle.path)
    original = onnxruntime.build

    def build(graph, out):
        if "embed" in out.name:
            raise error
        out.unlink(missing_ok=True)
        out.write_bytes(b"new")
        return out

    monkeypatch.setattr(onnxruntime, "build", build)
    with pytest.raises(BaseException):  # noqa: B017 (whatever it was)
        build_bundle(bundle.path, "ort")
    assert snapshot(bundle.path) == before
    monkeypatch.setattr(onnxruntime, "build", original)
    build_bundle(bundle.path, "ort")
    Bundle.open(bundle.path)
    assert not list(bundle.path.parent.glob(".*"))


def test_a_changed_bundle_is_refused(bundle):
    graph = bundle.graph("embed_tokens")
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    with pytest.raises(InputError, match="is not the file that was written"):
        build_bundle(bundle.path, "ort")
    assert not (bundle.path / "engines").exists()


def test_a_directory_that_is_no_bundle(tmp_path):
    with pytest.raises(InputError, match="is not a bundle"):
        build_bundle(tmp_path, "ort")


def test_what_tensorrt_cannot_build_is_said_before_the_bundle_is_touched(bundle):
    pytest.importorskip("tensorrt_rtx_bindings")
    before = snapshot(bundle.path.parent)
    with pytest.raises(MissingRequirement, match="cannot build for sm87"):
        build_bundle(bundle.path, "trt", archs=["sm86", "sm87"])
    assert snapshot(bundle.path.parent) == before


def test_targets_are_checked_without_a_bundle():
    check_target("ort")
    with pytest.raises(InputError, match="'pascal' is not a GPU architecture"):
        check_target("trt", ["pascal"])


def test_a_work_folder_needs_no_manifest(bundle, tmp_path):
    os.rename(bundle.path / "onnx", tmp_path / "onnx")
    assert len(build_into(tmp_path, "ort", bundle.manifest.workload)) == 3
    assert not (tmp_path / "manifest.json").exists()


class Told(Silent):
    """Keeps the lines worth reading."""

    def __init__(self):
        self.lines = []

    def note(self, line):
        self.lines.append(line)


def test_types_that_are_not_there(bundle):
    with pytest.raises(InputError, match=r"vision_encoder_bf16\.onnx is missing"):
        build_into(bundle.path, "ort", bundle.manifest.workload, "bf16")
    bundle.graph("embed_tokens", "fp16").unlink()
    told = Told()
    assert build_module._present_dtype(bundle.path, "ort", told) == "fp32" and not told.lines
    assert build_module._present_dtype(bundle.path, "trt", told) == "fp32"
    assert told.lines == ["engines for trt are built in fp32: there are no fp16 graphs (--dtype fp16 makes some)"]
    bundle.graph("embed_tokens").unlink()
    with pytest.raises(InputError, match="no complete set of graphs"):
        build_into(bundle.path, "trt", bundle.manifest.workload)


def test_the_manifest_lists_what_is_there_and_nothing_more(bundle):
    build_bundle(bundle.path, "ort")
    listed = set(json.loads((bundle.path / "manifest.json").read_text())["files"])
    assert listed == {p.relative_to(bundle.path).as_posix() for p in bundle.path.rglob("*") if p.is_file()} - {"manifest.json"}
