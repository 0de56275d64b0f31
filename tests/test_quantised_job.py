"""Quantised weights through the real command line: what the bundle holds, what its verbs make of it, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hurry import HURRY
from quantised import operators

from infoprune_export.bundle import DECODER, VISION, Bundle
from infoprune_export.graph.count import count_bundle

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def small(tmp_path_factory, run, small_model, bundle):
    """A bundle of the small model with the plan of the session's bundle, and int4 weights."""
    recipe = tmp_path_factory.mktemp("recipes") / "quantised.yaml"
    recipe.write_text(
        f"model: {small_model}\n"
        "workload: {text_tokens: 16, new_tokens: 4}\n"
        "weights: int4\n"
        "calibration: [{path: 'tiny:vqa', split: train}]\n"
        "evaluation: {vqa: {path: 'tiny:vqa', samples: 20}}\n"
    )
    out = tmp_path_factory.mktemp("bundles") / "quantised"
    run(recipe, "--plan", bundle, "--target", "ort", "--no-original", *HURRY, "--out", out)
    return out


def test_quantised_graphs_and_engines_lie_beside_the_float_ones(small):
    opened = Bundle.open(small)
    assert opened.manifest.precisions == ["q4", "fp32"]
    for component, name, share in ((VISION, "vision_encoder_int8", 0.4), (DECODER, "decoder_model_merged_q4", 0.25)):
        for place in ("onnx", "engines/ort"):
            assert {f"{component}.onnx", f"{name}.onnx"} <= {p.name for p in (small / place).iterdir()}
        counts = opened.manifest.weights.components[component]
        assert operators(small / "engines" / "ort" / f"{name}.onnx")["MatMulNBits"] == counts.matrices > 10
        assert (small / "onnx" / f"{name}.onnx_data").stat().st_size < share * (small / "onnx" / f"{component}.onnx_data").stat().st_size
    assert not (small / "onnx" / "embed_tokens_q4.onnx").exists()
    assert count_bundle(small / "onnx", opened.manifest.workload, "q4") == count_bundle(small / "onnx", opened.manifest.workload)


def test_the_report_keeps_two_errors_apart(small):
    report = json.loads((small / "report.json").read_text())
    numerics = report["numerics"]
    assert {"decoder_model_merged", "decoder_model_merged_q4", "decoder_model_merged_ort_q4", "generation_ort_q4"} <= set(numerics)
    assert all(record["passed"] for record in numerics.values())
    assert numerics["decoder_model_merged"]["max_rel"] < 1e-4  # the float network against PyTorch
    quantisation = report["quantisation"]
    assert (quantisation["weights"], quantisation["block_size"]) == ("int4", 32)
    # Quantising changes the network far more than an engine's rounding does.
    far = quantisation["distance"]["decoder_model_merged_q4"]["max_rel"]
    assert numerics["decoder_model_merged_ort_q4"]["max_rel"] < far < 1
    assert quantisation["prompts"] == numerics["generation"]["prompts"]
    assert 0 <= report["accuracy"]["vqa"]["quantised"] <= 1
    for part in ("vision", "prefill", "decode", "end_to_end"):
        assert report["latency"]["ort"][part]["quantised"]["median_ms"] > 0
    assert report["size"]["quantised_bytes"] < 0.45 * report["size"]["compressed_bytes"]


def test_card_and_page_say_what_is_quantised_and_what_is_not(small):
    card = (small / "README.md").read_text()
    counts = Bundle.open(small).manifest.weights.components[DECODER]
    assert "| `vision_encoder` | int8 |" in card
    assert f"| `decoder_model_merged` | int4 | {counts.matrices} | {counts.parameters:,} | {counts.float_parameters:,} |" in card
    assert "block of 32 inputs" in card.replace("\n", " ") and "embedding table" in card
    assert "with int4 weights | change, points |\n|---|---|---|---|---|---|---|---|\n| vqa | 20 |" in card
    assert "decoder_model_merged_q4" in (small / "report.html").read_text()


def test_inspect_shows_it(run, small):
    assert json.loads(run("inspect", small, "--json").stdout)["weights"]["type"] == "int4"
    assert "also with int4 weights in blocks of 32 (q4)" in run("inspect", small).stdout
    graph = json.loads(run("inspect", small / "onnx" / "decoder_model_merged_q4.onnx", "--json").stdout)
    assert graph["nodes"]["DequantizeLinear"] == Bundle.open(small).manifest.weights.components[DECODER].matrices


def test_generate_runs_the_quantised_network(run, small, picture, tmp_path):
    asked = ("--image", picture, "--prompt", "what color is the shape?")
    for engine in ("ort", "onnx"):
        assert run("generate", small, *asked, "--engine", engine).stdout.strip()
    broken = Path(shutil.copytree(small, tmp_path / "broken"))
    for name in ("decoder_model_merged_q4.onnx", "decoder_model_merged.onnx"):
        (broken / "engines" / "ort" / name).unlink()
    Bundle(broken, Bundle.open(small).manifest).write_manifest()
    assert "has no decoder_model_merged for ort in q4" in run("generate", broken, *asked, code=2).stderr


def test_bench_times_it_in_turn(run, small):
    parts = json.loads(run("bench", small, "--seconds", "0.1", "--json").stdout)["latency"]["ort"]
    assert parts["decode"]["quantised"]["n"] == parts["decode"]["compressed"]["n"] >= 3
    assert "quantised" in run("bench", small, "--seconds", "0.1").stdout


def test_a_device_quantises_without_pytorch(run, bundle_copy):
    block = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['onnx_ir'] = None;"
        "from infoprune_export.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", block, "build", str(bundle_copy), "--target", "ort", "--weights", "int8"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    manifest = Bundle.open(bundle_copy).manifest
    assert manifest.weights.type == "int8" and manifest.quantised == ["int8"]
    assert "engines/ort/decoder_model_merged_int8.onnx" in done.stderr
    assert not (bundle_copy / "original" / "engines" / "ort" / "decoder_model_merged_int8.onnx").exists()
    assert run("generate", bundle_copy, "--prompt", "what color is the shape?").stdout.strip()
    assert "has int8 graphs already" in run("build", bundle_copy, "--target", "ort", "--weights", "int4", code=2).stderr
    run("apply", bundle_copy, "--to", bundle_copy, "--out", bundle_copy.with_name("applied"))
    applied = bundle_copy.with_name("applied") / "onnx" / "decoder_model_merged_int8.onnx"
    assert applied.read_bytes() == (bundle_copy / "onnx" / applied.name).read_bytes()


def test_an_unknown_type_of_weights(run, tmp_path):
    assert "'int2' is not one of 'int8', 'int4'" in run("tiny-llava", "--weights", "int2", "--out", tmp_path / "out", code=2).stderr
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: package:tiny_llava\nweights: int3\n")
    assert "line 2: weights: Input should be 'int8' or 'int4'" in run(recipe, "--out", tmp_path / "out", code=2).stderr
    assert not (tmp_path / "out").exists()
