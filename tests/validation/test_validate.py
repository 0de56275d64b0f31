"""The whole validation, on a bundle whose engines are fakes and whose data, tokenizer and image processor are real."""

from __future__ import annotations

import gc
import json
import os
import shutil
import weakref
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

import infoprune_export as ip
from infoprune_export.bundle import COMPONENTS, DECODER, VISION, Bundle, Manifest, QuantisedWeights, graph_file
from infoprune_export.cli import cli
from infoprune_export.errors import GateFailed, InputError, MissingRequirement, NotEnough
from infoprune_export.models.flops import count
from infoprune_export.recipe import DataSource, Recipe, Workload
from infoprune_export.runtime.session import Session
from infoprune_export.validation.bench import bench_bundle
from infoprune_export.validation.overflow import Overflow
from infoprune_export.validation.report import Report
from infoprune_export.validation.validate import Run, validate_bundle

TINY = Path(str(resources.files("infoprune_export"))) / "models" / "tiny_llava"
SIZES = {"vocab": 434, "image_token": 433, "image_tokens": 64, "width": 64}
WORKLOAD = Workload(image_tokens=64, text_tokens=6, new_tokens=5)
VQA = {"vqa": DataSource(path="tiny:vqa", samples=9)}


@pytest.fixture
def bundle(tmp_path, plan, flops, reference, make_session) -> Bundle:
    """A work folder as the main job hands it over: no hashes, the original inside."""
    directory = tmp_path / "bundle"
    for root in (directory, directory / "original"):
        (root / "onnx").mkdir(parents=True)
        for component, size in (("vision_encoder", 100), ("embed_tokens", 10), ("decoder_model_merged", 1000)):
            (root / "onnx" / f"{component}.onnx").write_bytes(b"x")
            (root / "onnx" / f"{component}.onnx_data").write_bytes(b"x" * size * (1 + (root != directory)))
    for file in TINY.glob("*.js*"):
        shutil.copy(file, directory)
    (directory / "chat_template.jinja").write_bytes((TINY / "chat_template.jinja").read_bytes())
    geometry = plan.anatomy.geometry.model_copy(update={"image_size": 64, "patch_size": 8, "image_tokens": 64, "tokens": 65})
    anatomy = plan.anatomy.model_copy(update={"geometry": geometry, "vocab_size": 434})
    plan = plan.model_copy(update={"anatomy": anatomy, "workload": WORKLOAD})
    (directory / "plan.json").write_text(plan.to_json())
    before, after = count(anatomy, WORKLOAD).parts(), count(anatomy, WORKLOAD, plan).parts()
    manifest = Manifest(
        tool="infoprune-export 0.1.0",
        libraries={},
        source=plan.source,
        recipe=Recipe(name="tiny-llava", model="package:tiny_llava", evaluation=VQA),
        workload=WORKLOAD,
        dtypes=["fp32"],
        targets=["ort", "trt"],
        flops=flops.model_copy(update={"parts": {k: {"original": v, "compressed": after[k]} for k, v in before.items()}}),
        files={},
    )
    _reference(make_session(0, **SIZES), reference).write(directory / "reference.safetensors")
    return Bundle(directory, manifest)


def _reference(session, small):
    """The small reference's prompts, answered by a session of the embedded model's sizes."""
    rng = np.random.default_rng(2)
    pixels = rng.standard_normal((3, 3, 64, 64)).astype(np.float32)
    prompts, generated, logits = [], [], []
    for p in small.prompts:
        image = [433] * 64 if p.image is not None else []
        prompts.append(replace(p, input_ids=np.concatenate([image, p.input_ids[p.input_ids < 30]]).astype(np.int64)))
        features = None if p.image is None else session.encode_images(pixels[[p.image]])
        answer = session.generate([prompts[-1].input_ids], None if p.image is None else pixels[[p.image]], 6, ())
        generated.append(np.concatenate(list(answer)))
        logits.append(session.prefill(session.embed(prompts[-1].input_ids[None], features), np.ones((1, len(prompts[-1].input_ids))))[0][0])
    known = np.setdiff1d(np.concatenate([p.input_ids for p in prompts[:4]]), [433])
    return replace(
        small,
        prompts=tuple(prompts),
        generated=tuple(generated),
        pixel_values=pixels,
        image_features=session.encode_images(pixels[:2]),
        inputs_embeds=session.table[known].astype(np.float32),
        logits=np.stack(logits[:4]),
        image_token_id=433,
        eos_token_ids=(),
    )


@pytest.fixture(autouse=True)
def opened(monkeypatch, make_session) -> list[tuple[str, bool]]:
    """Replaces engines by fakes: the original is another network, TensorRT has no driver. Holds what was opened."""
    seen = []

    def open_session(bundle, *, engine="ort", dtype="fp32", original=False, threads=None):
        if engine == "trt":
            raise MissingRequirement("no NVIDIA driver here", mend="run this on the target")
        if original and not bundle.has_original:
            raise InputError("does not hold the original network", where=bundle.path)
        seen.append((engine, original))
        return make_session(7 if original else 0, **SIZES)

    monkeypatch.setattr(Session, "open", open_session)
    monkeypatch.setattr("infoprune_export.validation.validate.gpus", lambda: [])
    return seen


def test_everything_that_can_be_measured_is(bundle, tmp_path):
    lines, told = [], []
    report = validate_bundle(bundle, seconds=0, notify=lines.append, progress=lambda *a: told.append(a), max_drop=100)
    components = ["vision_encoder", "embed_tokens", "decoder_model_merged", "generation"]
    assert list(report.numerics) == [*components, *(f"{c}_ort" for c in components)]
    assert report.numerics["generation"].identical_token_ids == report.numerics["generation"].prompts == 10
    assert report.accuracy["vqa"].n == 9 and report.accuracy["vqa"].engine == "ort" and report.accuracy["vqa"].original is not None
    assert list(report.latency) == ["ort"] and list(report.latency["ort"]) == ["vision", "prefill", "decode", "end_to_end"]
    assert report.latency_settings["ort"].devices == {"decoder_model_merged": "cpu"}
    assert report.latency["ort"]["decode"].flops_kept == pytest.approx(
        bundle.manifest.flops.parts["decode"]["compressed"] / bundle.manifest.flops.parts["decode"]["original"]
    )
    assert (report.size.original_bytes, report.size.compressed_bytes) == (2 * 1110 + 3, 1110 + 3)
    reason = "no NVIDIA GPU here; run `infoprune-export validate DIR` on the target"
    assert {e.what: e.reason for e in report.not_measured} == {"numerics.trt": reason, "latency.trt": reason}
    assert report.passed and set(report.gates) == {"numerics", "max_drop"}
    assert "cpu" in report.machine
    assert sum(line.startswith("PASSED") for line in lines) == 8 and any(line.startswith("SKIPPED | latency.trt") for line in lines)
    assert ("vqa, compressed", 9, 9) in told and ("timing ort", 4, 4) in told
    report.write(tmp_path, bundle.plan())
    assert Report.read(tmp_path / "report.json") == report


def test_without_the_original_its_figures_are_absent_and_said_to_be(bundle):
    shutil.rmtree(bundle.path / "original")
    report = validate_bundle(bundle, seconds=0, max_drop=1, min_speedup=1)
    assert report.accuracy["vqa"].original is None and report.size.original_bytes is None
    assert all(part.original is None and part.speedup is None for part in report.latency["ort"].values())
    assert report.not_measured[0].what == "original" and "--original DIR0" in report.not_measured[0].reason
    with pytest.raises(GateFailed, match="max_drop: not measured"):
        report.raise_for_gates()


def test_an_original_in_a_bundle_of_its_own(bundle, plan, tmp_path, opened):
    whole = tmp_path / "whole"
    shutil.copytree(bundle.path, whole)
    shutil.rmtree(bundle.path / "original")
    given = Bundle(whole, bundle.manifest)
    validate_bundle(bundle, original=given, evaluation={}, seconds=0)
    assert ("ort", True) in opened, "a compressed bundle lends the original that it keeps"
    shutil.rmtree(whole / "original")
    with pytest.raises(InputError, match="is compressed and keeps no original"):
        validate_bundle(bundle, original=given, evaluation={}, seconds=0)
    data = json.loads((whole / "plan.json").read_text())
    sizes = {("vision", i): (3, 3) for i in range(2)} | {("language", i): (4, 2) for i in range(3)}
    for decision in data["layers"]:
        heads, groups = sizes[decision["tower"], decision["layer"]]
        decision |= {"heads": list(range(heads)), "kv_groups": list(range(groups)), "ranks": dict.fromkeys(decision["ranks"])}
    (whole / "plan.json").write_text(json.dumps(data))
    report = validate_bundle(bundle, original=given, evaluation={}, seconds=0)
    assert report.latency["ort"]["vision"].original is not None and report.size.original_bytes == 1113
    given.manifest = bundle.manifest.model_copy(update={"source": bundle.manifest.source.model_copy(update={"sha256": "1" * 64})})
    with pytest.raises(InputError, match="is made from tiny/llava, not from"):
        validate_bundle(bundle, original=given, evaluation={}, seconds=0)


def test_data_that_is_not_here_is_not_measured_and_the_rest_is(bundle):
    evaluation = {"gone": DataSource(path="/nowhere"), **VQA}
    report = validate_bundle(bundle, evaluation=evaluation, seconds=0)
    assert list(report.accuracy) == ["vqa"]
    assert "/nowhere: does not exist" in next(e.reason for e in report.not_measured if e.what == "accuracy.gone")


def test_accuracy_that_cannot_be_measured_now_is_kept(bundle, monkeypatch, tmp_path):
    bundle.manifest.recipe.evaluation = {"vqa": DataSource(path="data/vqa")}
    first = validate_bundle(bundle, evaluation=VQA, seconds=0)
    first.measured_at = "2026-01-01T00:00:00Z"
    first.write(bundle.path)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        later = validate_bundle(bundle, seconds=0, max_drop=100)
        assert not later.gates["max_drop"].passed, "it is not measured again by being kept"
        later.write(bundle.path)
    kept = Report.read(bundle.path / "report.json")
    assert kept.accuracy == {"vqa": first.accuracy["vqa"].model_copy(update={"measured_at": "2026-01-01T00:00:00Z"})}
    assert "kept of an earlier report, measured 2026-01-01T00:00:00Z" in (bundle.path / "report.html").read_text()
    reason = next(x.reason for x in kept.not_measured if x.what == "accuracy.vqa")
    assert reason.startswith("data/vqa: does not exist") and reason.endswith(f"looked for in the working directory, {tmp_path}")
    validate_bundle(bundle, evaluation=VQA, seconds=0).write(bundle.path)
    assert Report.read(bundle.path / "report.json").accuracy["vqa"].measured_at is None


def test_no_data_at_all(bundle):
    report = validate_bundle(bundle, evaluation={}, seconds=0)
    assert not report.accuracy and "no evaluation data" in next(e.reason for e in report.not_measured if e.what == "accuracy")


def test_an_engine_that_opens_and_does_not_run_fails_the_gate(bundle, make_session, monkeypatch):
    def refuse(self, *inputs):
        raise InputError("ONNX Runtime cannot run this graph on these inputs", where="decoder_model_merged.onnx")

    monkeypatch.setattr(make_session, "prefill", refuse)
    report = validate_bundle(bundle, seconds=0)
    assert not report.gates["numerics"].passed and "decoder_model_merged.onnx" in report.numerics["generation"].message
    assert not report.accuracy and not report.latency
    unrun = {e.what for e in report.not_measured if e.reason == "no engine of this bundle runs here"}
    assert unrun == {"accuracy", "latency"}


def test_a_gpu_that_fails_costs_its_own_engine_and_no_other(bundle, make_session, monkeypatch):
    class Failing(make_session):
        def prefill(self, *inputs):
            raise NotEnough("the GPU has no memory left")

    def open_session(bundle, *, engine="ort", dtype="fp32", original=False, threads=None):
        return (Failing if engine == "trt" else make_session)(7 if original else 0, **SIZES)

    monkeypatch.setattr(Session, "open", open_session)
    report = validate_bundle(bundle, seconds=0)
    assert report.numerics["generation_trt"].message == "the GPU has no memory left" and not report.passed
    assert report.numerics["generation_ort"].passed and report.accuracy["vqa"].engine == "ort" and list(report.latency) == ["ort"]


@pytest.mark.parametrize("error", [NotEnough("the GPU has no memory left"), MissingRequirement("the NVIDIA driver refused cuMemAlloc_v2")])
def test_what_fails_after_its_numerics_is_not_measured(bundle, make_session, monkeypatch, error):
    class Failing(make_session):
        def encode_images(self, pixel_values):
            raise error

    def open_session(bundle, *, engine="ort", dtype="fp32", original=False, threads=None):
        if engine == "trt":
            raise error
        return (Failing if original else make_session)(0, **SIZES)

    monkeypatch.setattr(Session, "open", open_session)
    report = validate_bundle(bundle, seconds=0)
    assert report.passed and report.accuracy["vqa"].original is None and report.accuracy["vqa"].compressed is not None
    reasons = {x.what: x.reason for x in report.not_measured}
    assert reasons["accuracy of the original"] == reasons["latency.ort"] == str(error)
    assert {"numerics.trt", "latency.trt"} <= set(reasons)


def test_an_engine_asked_for_by_name_has_to_run(bundle):
    with pytest.raises(MissingRequirement, match="no NVIDIA driver"):
        validate_bundle(bundle, engines=["trt"], seconds=0)
    only = validate_bundle(bundle, engines=["ort"], evaluation={}, seconds=0)
    assert "vision_encoder" in only.numerics and only.numerics["vision_encoder"].engine == "ort"


def test_a_tensorrt_engine_is_judged_by_the_type_it_was_built_in(bundle, make_session, monkeypatch):
    opened = []

    def open_session(bundle, *, engine="ort", dtype="fp32", original=False, threads=None):
        opened.append((engine, dtype))
        return make_session(7 if original else 0, **SIZES, dtype="float16" if engine == "trt" or dtype == "fp16" else "float32")

    monkeypatch.setattr(Session, "open", open_session)
    monkeypatch.setattr("infoprune_export.validation.validate.first_overflow", lambda bundle, reference: Overflow(VISION, "v.0.up"))
    bundle.manifest.dtypes = ["fp32", "fp16"]
    report = validate_bundle(bundle, engines=["onnx", "trt"], evaluation={}, seconds=0)
    assert [name for name, r in report.numerics.items() if r.message and "leave it first at v.0.up" in r.message] == ["vision_encoder_fp16"]
    assert not report.numerics["vision_encoder_fp16"].passed
    assert {(r.engine, r.dtype) for r in report.numerics.values()} == {("onnx", "fp32"), ("onnx", "fp16"), ("trt", "fp16")}
    assert {"generation", "generation_fp16", "generation_trt_fp16"} <= set(report.numerics)
    assert list(report.latency) == ["trt"] and report.latency_settings["trt"].dtype == "fp16"
    assert opened.count(("trt", "fp32")) == 1, "once to see what it is, then by its own type"


def test_a_graph_that_does_not_run_is_still_looked_at_for_where_its_range_ends(bundle, make_session, monkeypatch):
    def check(session, reference, *, dtype, **given):
        if dtype == "fp16":
            raise InputError("no kernel of this type")
        return {}

    monkeypatch.setattr(Session, "open", lambda bundle, **given: make_session(0, **SIZES))
    monkeypatch.setattr("infoprune_export.validation.validate.dtype_of", lambda session: "fp16")
    monkeypatch.setattr("infoprune_export.validation.numerics.check", check)
    monkeypatch.setattr("infoprune_export.validation.validate.first_overflow", lambda bundle, reference: Overflow(DECODER, "v.0.up"))
    bundle.manifest.dtypes = ["fp16"]
    report = validate_bundle(bundle, engines=["onnx"], evaluation={}, seconds=0)
    assert "no kernel of this type" in report.numerics["generation"].message
    assert "leave it first at v.0.up" in report.numerics[DECODER].message and not report.numerics[DECODER].passed


def test_another_workload_has_its_own_flops(bundle):
    workload = Workload(image_tokens=64, text_tokens=30, new_tokens=2)
    report = validate_bundle(bundle, workload=workload, evaluation={}, seconds=0)
    plan = bundle.plan()
    kept = count(plan.anatomy, workload, plan).prefill / count(plan.anatomy, workload).prefill
    assert report.latency["ort"]["prefill"].flops_kept == kept
    assert report.latency_settings["ort"].workload == workload and report.workload == WORKLOAD


def test_a_workload_that_is_not_the_models_is_refused_before_any_work(bundle, opened):
    with pytest.raises(InputError, match="image_tokens: 64"):
        validate_bundle(bundle, workload=Workload(), seconds=0)
    assert not opened


def test_a_text_only_workload_says_what_it_has_not(bundle):
    report = validate_bundle(bundle, workload=Workload(images=0, text_tokens=5, new_tokens=1), evaluation={}, seconds=0)
    assert list(report.latency["ort"]) == ["prefill", "end_to_end"]
    assert {"latency.ort.vision", "latency.ort.decode"} <= {e.what for e in report.not_measured}


def test_a_missing_reference(bundle):
    bundle.reference.unlink()
    with pytest.raises(InputError, match="not a readable reference"):
        validate_bundle(bundle, seconds=0)


def test_a_bundle_that_cannot_be_written_is_refused_before_any_work(bundle, opened, monkeypatch):
    bundle.write_manifest()
    monkeypatch.setattr("infoprune_export.validation.report.os.access", lambda path, mode: not mode & os.W_OK)
    for validate in (lambda: ip.validate(bundle.path), lambda: cli.main(["validate", str(bundle.path)], standalone_mode=False)):
        with pytest.raises(InputError, match="the report cannot be written there"):
            validate()
    assert not opened


def test_figures_are_shown_where_they_cannot_be_written(bundle, report, monkeypatch, capsys):
    def refuse(self, directory, plan):
        raise NotEnough("the disk is full")

    bundle.write_manifest()
    monkeypatch.setattr("infoprune_export.validation.validate.validate_bundle", lambda *arguments, **options: report)
    monkeypatch.setattr(Report, "write", refuse)
    with pytest.raises(NotEnough):
        cli.main(["validate", str(bundle.path)], standalone_mode=False)
    assert "vqa accuracy" in capsys.readouterr().out


def test_bench_times_and_nothing_else(bundle):
    bench = bench_bundle(bundle, seconds=0)
    data = bench.as_dict()
    assert set(data) == {"workload", "latency", "latency_settings", "machine", "not_measured"}
    assert set(data["latency"]["ort"]) == {"vision", "prefill", "decode", "end_to_end"} and not bench.report.numerics
    json.dumps(data)


def test_quantised_weights_are_held_against_their_own_graphs(bundle, monkeypatch, make_session):
    """A network of its own: its engines pass against it, however far it is from the float one; TensorRT finds its engines by name."""

    def open_session(bundle, *, engine="ort", dtype="fp32", original=False, threads=None):
        if (engine, dtype) == ("trt", "q4"):
            raise MissingRequirement("there is no such engine for this GPU")
        opened.append((engine, dtype, original))
        half = engine == "trt" or "16" in dtype
        return make_session(7 if original else 3 if "q4" in dtype else 0, **SIZES, dtype="float16" if half else "float32")

    def float_answers(bundle, precision, reference, threads):
        if precision == "q4":
            raise InputError("no kernel of this type")
        return _reference(make_session(3, **SIZES), reference)

    opened = []
    monkeypatch.setattr(Session, "open", open_session)
    monkeypatch.setattr("infoprune_export.validation.quantisation.float_answers", float_answers)
    monkeypatch.setattr("infoprune_export.validation.validate.first_overflow", lambda bundle, reference: None)
    bundle.manifest.dtypes, bundle.manifest.targets = ["fp32", "fp16"], ["trt"]
    bundle.manifest.weights = QuantisedWeights(type="int4", block_size=32, components={})
    report = validate_bundle(bundle, seconds=0, max_drop=100)
    checked = {(r.engine, r.dtype) for r in report.numerics.values()}
    assert checked == {("onnx", "fp32"), ("onnx", "fp16"), ("onnx", "q4f16"), ("trt", "fp16"), ("trt", "q4f16")}
    assert report.gates["numerics"].passed
    assert [x.what for x in report.not_measured] == ["numerics.onnx.q4"]
    assert report.quantisation.distance["decoder_model_merged_q4f16"].max_rel > 0.1
    assert report.quantisation.identical_token_ids["q4f16"] < report.quantisation.prompts
    accuracy = report.accuracy["vqa"]
    assert (accuracy.engine, accuracy.dtype) == ("trt", "fp16") and accuracy.quantised is not None
    assert report.latency["trt"]["decode"].quantised.n == report.latency["trt"]["decode"].original.n
    assert ("trt", "q4f16", True) not in opened, "the original has no quantised weights"


def test_a_float_network_does_not_pass_for_the_quantised_one(bundle, monkeypatch, make_session):
    """Engines of quantised weights were built for another target than the one that runs here."""

    def open_session(bundle, *, engine="ort", dtype="fp32", original=False, threads=None):
        if engine == "trt" or (engine, dtype) == ("ort", "q4"):
            raise InputError("has no such engine", where=bundle.path)
        return make_session(0, **SIZES)

    monkeypatch.setattr(Session, "open", open_session)
    monkeypatch.setattr("infoprune_export.validation.quantisation.float_answers", lambda bundle, precision, reference, threads: reference)
    bundle.manifest.weights = QuantisedWeights(type="int4", block_size=32, components={})
    report = validate_bundle(bundle, seconds=0, max_drop=100, min_speedup=0.001)
    assert report.accuracy["vqa"].engine == "ort" and report.accuracy["vqa"].drop_points == 0
    assert report.latency["ort"]["end_to_end"].speedup is not None
    with pytest.raises(GateFailed, match=r"max_drop: not measured, .*; min_speedup: not measured"):
        report.raise_for_gates()
    reasons = {x.what: x.reason for x in report.not_measured}
    assert reasons["accuracy.quantised"] == reasons["latency.ort.quantised"]
    assert reasons["accuracy.quantised"].startswith("no int4 network for ort in fp32 runs here; build it: infoprune-export build DIR")


def test_accuracy_goes_through_an_engine_that_has_the_quantised_network_too(bundle, monkeypatch, make_session):
    def open_session(bundle, *, engine="ort", dtype="fp32", original=False, threads=None):
        if (engine, dtype) == ("ort", "q4"):
            raise InputError("has no such engine", where=bundle.path)
        return make_session(0, **SIZES)

    monkeypatch.setattr(Session, "open", open_session)
    monkeypatch.setattr("infoprune_export.validation.quantisation.float_answers", lambda bundle, precision, reference, threads: reference)
    bundle.manifest.weights = QuantisedWeights(type="int4", block_size=32, components={})
    report = validate_bundle(bundle, seconds=0, max_drop=100)
    assert report.accuracy["vqa"].engine == "trt" and report.accuracy["vqa"].quantised is not None and report.passed
    assert [x.what for x in report.not_measured] == ["latency.ort.quantised"]


def test_a_precision_that_does_not_open_is_told(bundle, monkeypatch):
    """Its graphs are there; those of an engine that was built in fewer precisions are not, which is nothing to tell."""
    bundle.manifest.dtypes, whole = ["fp32", "fp16"], Session.open
    for component in COMPONENTS:
        bundle.graph(component, "fp32").with_name(graph_file(component, "fp16")).write_bytes(b"graph")

    def open_session(bundle, *, engine="ort", dtype="fp32", **given):
        if dtype == "fp16":
            raise InputError("no kernel for float16")
        return whole(bundle, engine=engine, dtype=dtype, **given)

    monkeypatch.setattr(Session, "open", open_session)
    told = {x.what: x.reason for x in validate_bundle(bundle, evaluation={}, seconds=0).not_measured}
    assert told["numerics.onnx.fp16"] == "no kernel for float16" and "numerics.ort.fp16" not in told
    with pytest.raises(InputError, match="no kernel for float16"):
        validate_bundle(bundle, engines=["onnx"], evaluation={}, seconds=0)


def test_one_session_is_in_memory_at_a_time(bundle, monkeypatch):
    alive, most, whole = weakref.WeakSet(), [], Session.open

    def open_session(bundle, **given):
        gc.collect()
        most.append(len(alive))
        session = whole(bundle, **given)
        alive.add(session)
        return session

    monkeypatch.setattr(Session, "open", open_session)
    bundle.manifest.targets = ["ort"]
    run = Run(bundle, None, 1, lambda line: None, lambda *told: None)
    run.check_numerics(None)
    assert most == [0, 0]


def test_no_session_is_in_memory_beside_those_that_look_inside_a_graph(bundle, make_session, monkeypatch):
    alive, beside = weakref.WeakSet(), []

    def open_session(bundle, **given):
        alive.add(session := make_session(0, **SIZES))
        return session

    def look(*given):
        gc.collect()
        beside.append(len(alive))

    monkeypatch.setattr(Session, "open", open_session)
    monkeypatch.setattr("infoprune_export.validation.validate.dtype_of", lambda session: "fp16")
    monkeypatch.setattr("infoprune_export.validation.validate.first_overflow", look)
    bundle.manifest.dtypes = ["fp16"]
    validate_bundle(bundle, engines=["onnx"], evaluation={}, seconds=0)
    assert beside == [0]
