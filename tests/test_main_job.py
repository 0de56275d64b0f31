"""The main job through the real command line: what is in a bundle, what it is worth, and what happens to a damaged one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hurry import HURRY

from infoprune_export.bundle import COMPONENTS, Bundle, hash_tree

ROOT = Path(__file__).parent.parent


def test_the_bundle_has_what_the_contract_names(bundle):
    opened = Bundle.open(bundle)
    for component in COMPONENTS:
        assert opened.graph(component).is_file()
        assert opened.graph(component, original=True).is_file()
        assert (opened.engines("ort") / f"{component}.onnx").is_file()
    for name in ("README.md", "plan.json", "factors.safetensors", "report.json", "report.html", "config.json", "tokenizer.json"):
        assert (bundle / name).is_file()
    assert not list(bundle.rglob("*.bin")) + list(bundle.rglob("*.part")) + list(bundle.glob(".*"))


def test_flops_are_met_from_below_and_counted_on_the_graphs(bundle):
    from infoprune_export.graph.count import count_bundle

    manifest = Bundle.open(bundle).manifest
    assert 0.59 <= manifest.flops.achieved <= 0.6
    counted = {
        kind: count_bundle(bundle / place, manifest.workload) for kind, place in (("original", "original/onnx"), ("compressed", "onnx"))
    }
    parts = ("vision", "projector", "prefill", "decode")
    assert manifest.flops.parts == {p: {kind: counted[kind][p] for kind in counted} for p in parts}
    assert manifest.flops.achieved == sum(counted["compressed"][p] for p in parts) / sum(counted["original"][p] for p in parts)
    assert Bundle.open(bundle).plan().budget.predicted == pytest.approx(manifest.flops.achieved, abs=1e-12)


def test_the_report_has_passed_numerics_and_figures_for_every_part(bundle):
    report = json.loads((bundle / "report.json").read_text())
    assert all(r["passed"] for r in report["numerics"].values())
    generation = report["numerics"]["generation"]
    assert generation["prompts"] >= 100
    assert generation["identical_token_ids"] == generation["prompts"]
    assert set(report["accuracy"]) == {"vqa", "gqa"}
    assert set(report["latency"]["ort"]) == {"vision", "prefill", "decode", "end_to_end"}
    assert report["flops"]["achieved"] == Bundle.open(bundle).manifest.flops.achieved
    assert report["gates"]["numerics"]["passed"]


def test_the_bundle_is_smaller_than_its_original(bundle):
    def weights(place):
        return sum(p.stat().st_size for p in (bundle / place).glob("*.onnx_data"))

    assert weights("onnx") < 0.75 * weights("original/onnx")


def test_loading_gives_the_same_logits_bit_for_bit(bundle, small_model):
    import torch
    from safetensors.torch import load_file

    import infoprune_export as ip
    from infoprune_export.compress.surgery import apply_plan
    from infoprune_export.models.load import locate
    from infoprune_export.plans import Plan

    before = locate(str(small_model)).load_model()
    plan = Plan.load(bundle)
    apply_plan(before, plan, plan.factors)
    after = ip.load(bundle)
    reference = load_file(bundle / "reference.safetensors")
    ids = reference["input_ids"][: reference["input_offsets"][1]][None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": reference["pixel_values"][reference["images"][:1]]}
    assert torch.equal(before(**inputs).logits, after(**inputs).logits)


def test_the_processor_is_readable_by_transformers(bundle):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(bundle)
    assert processor.tokenizer.encode("what color is the shape?")


def test_generate_answers_without_pytorch(run, bundle, picture):
    block = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; from infoprune_export.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", block, "generate", str(bundle), "--image", str(picture), "--prompt", "what color is the shape?"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == run("generate", bundle, "--image", picture, "--prompt", "what color is the shape?").stdout


def test_inspect_shows_layers_files_and_graphs(run, bundle):
    facts = json.loads(run("inspect", bundle / "plan.json", "--json").stdout)
    assert len(facts["layers"]) == 4
    assert "kv groups" in run("inspect", bundle / "plan.json").stdout
    assert "decoder_model_merged.onnx" in run("inspect", bundle).stdout
    graph = json.loads(run("inspect", bundle / "onnx" / "decoder_model_merged.onnx", "--json").stdout)
    assert {"inputs_embeds", "attention_mask", "position_ids", "past_key_values.0.key"} <= set(graph["inputs"])
    assert {"logits", "present.1.value"} <= set(graph["outputs"])


def test_both_routes_of_apply_give_the_same_network(run, bundle, small_model, tmp_path):
    import onnxruntime
    from networks import decoder_feeds

    run("apply", bundle / "plan.json", "--to", bundle, "--out", tmp_path / "graphs")
    run("apply", bundle, "--to", small_model, "--out", tmp_path / "weights")  # a plan may be named by its directory
    weights = "model/model.safetensors"
    assert (tmp_path / "weights" / weights).read_bytes() == (bundle / weights).read_bytes()
    outputs = []
    for root in (tmp_path / "graphs", bundle):
        session = onnxruntime.InferenceSession(root / "onnx" / "decoder_model_merged.onnx")
        outputs.append(session.run(None, decoder_feeds(session)))
    for a, b in zip(*outputs, strict=True):
        assert a.shape == b.shape
        assert abs(a - b).max() < 1e-4


def test_a_failed_gate_is_exit_1_and_keeps_the_bundle(run, bundle_copy):
    message = run("validate", bundle_copy, "--min-speedup", "1000", *HURRY, code=1).stderr
    assert "min_speedup" in message
    Bundle.open(bundle_copy)


def test_a_network_too_large_for_float16_fails_and_the_layer_is_named(run, small_model, tmp_path):
    from safetensors.numpy import load_file, save_file

    large, feed_forward = Path(shutil.copytree(small_model, tmp_path / "large")), "model.language_model.layers.1.mlp"
    weights = load_file(large / "model.safetensors")
    for name, gain in (("up_proj", 50), ("down_proj", 20_000)):
        weights[next(k for k in weights if k.endswith(f"layers.1.mlp.{name}.weight"))] *= gain
    save_file(weights, large / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "bundle"
    failed = run(large, "--flops", "1", "--target", "onnx", "--dtype", "fp16", *HURRY, "--out", out, code=1)
    why = f"float16 ends at 65,504, and values leave it first at {feed_forward}.down_proj: use --dtype bf16 or fp32"
    assert why in " ".join(failed.stdout.split())
    report = json.loads((out / "report.json").read_text())
    assert why in report["numerics"]["decoder_model_merged"]["message"]
    assert report["numerics"]["vision_encoder"]["passed"]


def test_a_bundle_validates_against_its_original_elsewhere(run, bundle_copy, tmp_path):
    moved = tmp_path / "elsewhere"
    bundle_copy.rename(moved)
    report = json.loads(run("validate", moved, *HURRY, "--json").stdout)
    assert report["latency"]["ort"]["decode"]["speedup"] > 0


# Damaged bundles and other bad input


@pytest.mark.parametrize("verb", [("validate",), ("generate", "--prompt", "hello"), ("build", "--target", "ort"), ("inspect",), ("bench",)])
def test_a_changed_byte_is_noticed(run, bundle_copy, verb):
    victim = bundle_copy / "onnx" / "decoder_model_merged.onnx_data"
    if not victim.exists():
        victim = next((bundle_copy / "onnx").glob("*_data"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert f"{victim.relative_to(bundle_copy)} is not the file that was written" in run(verb[0], bundle_copy, *verb[1:], code=2).stderr


def test_a_manifest_path_that_leaves_the_bundle(run, bundle_copy):
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    manifest["files"]["../../etc/passwd"] = {"sha256": "0" * 64, "bytes": 1}
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    assert "leaves the bundle" in run("validate", bundle_copy, code=2).stderr


def test_an_external_data_path_that_leaves_the_bundle(run, bundle_copy):
    import onnx

    graph = bundle_copy / "onnx" / "vision_encoder.onnx"
    model = onnx.load(graph, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == "location").value = "../../../secret"
    onnx.save(model, graph)
    opened = Bundle.open(bundle_copy, verify=False)
    opened.write_manifest()
    for verb in (["generate", bundle_copy, "--prompt", "x", "--engine", "onnx"], ["build", bundle_copy, "--target", "ort"]):
        assert "../../../secret" in run(*verb, code=2).stderr


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_an_image_that_does_not_decode(run, bundle, tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    assert "x.png" in run("generate", bundle, "--image", path, "--prompt", "what?", code=2).stderr


def test_an_absurdly_large_image_is_refused_before_it_is_decoded(run, bundle, tmp_path):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path = tmp_path / "huge.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
        + chunk(b"IEND", b"")
    )
    assert "huge.png" in run("generate", bundle, "--image", path, "--prompt", "what?", code=2).stderr


def test_a_plan_for_another_model(run, bundle, tmp_path):
    message = run("apply", bundle / "plan.json", "--to", "tiny-llava", "--out", tmp_path / "out", code=2).stderr
    assert "was made for another model" in message
    assert not (tmp_path / "out").exists()


def test_a_directory_without_a_plan(run, small_model, tmp_path):
    for given in (("apply", tmp_path, "--to", small_model), (small_model, "--plan", tmp_path)):
        assert "holds no plan.json" in run(*given, "--out", tmp_path / "out", code=2).stderr


def test_a_plan_for_layers_that_do_not_exist(run, bundle, small_model, tmp_path):
    plan = json.loads((bundle / "plan.json").read_text())
    plan["layers"][0]["layer"] = 9
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    message = run(small_model, "--plan", tmp_path / "plan.json", "--out", tmp_path / "out", code=2).stderr
    assert "plan.json: layers[0]: the model has no layer 9 in its vision tower" in message


def test_an_edited_plan_gets_new_factors(run, bundle, small_model, tmp_path):
    plan = json.loads((bundle / "plan.json").read_text())
    plan["layers"][3]["ranks"] = {"gate": 16, "up": 24, "down": None}
    plan["factors_sha256"] = None
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    run("apply", tmp_path / "plan.json", "--to", small_model, "--samples", "8", "--out", tmp_path / "out")
    import infoprune_export as ip

    assert ip.load(tmp_path / "out").get_submodule("model.language_model.layers.1.mlp.gate_proj").first.out_features == 16


def test_a_plan_that_was_killed_while_it_was_written_is_made_again(run, small_model, tmp_path):
    (tmp_path / "factors.safetensors.part").touch()
    run("plan", small_model, "--flops", "1", "--out", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"plan.json", "factors.safetensors"}
    (tmp_path / "thesis.tex").touch()
    assert "holds something else than a plan" in run("plan", small_model, "--flops", "1", "--out", tmp_path, code=2).stderr


def test_a_full_disk_is_said_and_the_run_goes_on_afterwards(small_model, tmp_path):
    import resource

    command = [
        sys.executable,
        "-m",
        "infoprune_export",
        str(small_model),
        "--target",
        "onnx",
        "--no-original",
        *HURRY,
        "--out",
        str(tmp_path / "out"),
    ]

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, preexec_fn=limit, check=False)
    assert done.returncode == 4, done.stderr
    assert "disk is full" in done.stderr
    assert not (tmp_path / "out").exists()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


STAGES = ("compress", "reference", "graphs", "engines")


@pytest.mark.slow
@pytest.mark.parametrize("killed_in", [*STAGES, "validate"])
def test_kill_9_in_any_stage_then_the_same_command_gives_the_same_bundle(bundle, small_model, tmp_path, killed_in):
    recipe = tmp_path / "small.yaml"
    shutil.copyfile(next(bundle.parent.parent.glob("recipes*/small.yaml")), recipe)
    command = [sys.executable, "-m", "infoprune_export", str(recipe), "--target", "ort", "--out", str(tmp_path / "out")]
    same = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}  # as `bundle` was made: sums are rounded by the number of threads
    process = subprocess.Popen(command, **same, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = STAGES[: STAGES.index(killed_in)] if killed_in in STAGES else STAGES
    while process.poll() is None:
        stages = {p.name for p in tmp_path.glob(".out.work-*/stages/*")}
        if set(done) <= stages and list(tmp_path.glob(".out.work-*")):
            time.sleep(0.3)
            process.kill()
        time.sleep(0.02)
    assert not (tmp_path / "out").exists()
    assert subprocess.run(command, **same, capture_output=True, check=False).returncode == 0
    expected, got = hash_tree(bundle), hash_tree(tmp_path / "out")
    assert got.keys() == expected.keys()
    changed = {name for name in got if got[name] != expected[name]}
    assert changed <= {"README.md"}


def test_two_runs_into_one_directory_the_second_is_refused(run, small_model, tmp_path):
    command = [sys.executable, "-m", "infoprune_export", str(small_model), "--target", "onnx", "--out", str(tmp_path / "out")]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / ".out.lock").exists() and first.poll() is None:
            time.sleep(0.05)
        assert "another run is writing this bundle" in run(small_model, "--target", "onnx", "--out", tmp_path / "out", code=2).stderr
    finally:
        first.kill()
        first.wait()
