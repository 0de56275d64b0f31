"""The speed benchmark at toy sizes: what it measures and how it says it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from infoprune_export.errors import MissingRequirement

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import bench_speed  # noqa: E402
from shapes import SHAPES  # noqa: E402
from speed import bundles, capacity, exports, genai, openings, slices, weights  # noqa: E402

TIMES = {"median_ms": 10.0}
FOUND = {
    "llava7b": {
        "parts": {"prefill": {"dense": TIMES, "compressed": {"median_ms": 4.0}, "speedup": 2.5, "kept": 0.33, "efficiency": 0.825}},
    },
    "tiny": {
        "latency": {
            "ort": {
                "end_to_end": {"original": TIMES, "compressed": {"median_ms": 5.0}, "speedup": 2.0, "flops_kept": 0.33},
            }
        }
    },
}


SIZES = {
    "hidden": 128,
    "layers": 3,
    "heads": 8,
    "ffn": 512,
    "vision_hidden": 64,
    "vision_heads": 8,
    "vision_ffn": 256,
    "rank_multiple": 4,
}
SMALL = replace(SHAPES["small"], **SIZES)
INT4 = {
    "parts": {"decode": {"float": TIMES, "int4": {"median_ms": 4.0}, "speedup": 2.5, "bytes_ratio": 0.16}},
    "bundle": {
        "size_ratio": 0.21,
        "drop_points": 0.5,
        "tasks": {"vqa": {"original": 0.95, "compressed": 0.9, "quantised": 0.895, "n": 100}},
    },
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return slices.measure(SMALL, tmp_path_factory.mktemp("slices"), threads=1, seconds=0.2)["parts"]


def test_every_part_keeps_at_most_its_share_and_efficiency_is_speedup_times_that(measured):
    assert list(measured) == ["vision", "prefill", "decode"]
    for part, x in measured.items():
        assert x["dense"]["n"] == x["compressed"]["n"] >= 3
        assert x["speedup"] == x["dense"]["median_ms"] / x["compressed"]["median_ms"]
        assert x["efficiency"] == pytest.approx(x["speedup"] * x["kept"])
        assert 0.2 < x["kept"] < 0.6, part


def test_a_token_by_length_and_by_capacity(tmp_path):
    shape = replace(SHAPES["small"], hidden=64, heads=4, layers=2)
    found = capacity.measure(tmp_path, threads=1, seconds=0.2, shape=shape, lengths=(100, 700))
    assert set(found["capacity"]) == {"256", "4096"} and set(found["length"]) == {"100", "700"}
    assert found["capacity_slope"] == found["capacity"]["4096"]["median_ms"] / found["capacity"]["256"]["median_ms"]
    assert found["length_fit"] == pytest.approx(1)  # two points lie on a line


@pytest.mark.skipif(not importlib.util.find_spec("onnxruntime_genai"), reason="a peer that is not installed")
def test_our_graph_and_the_builders_agree(tmp_path):
    found = genai.measure(replace(genai.DENSE, layers=2, prompt=20), tmp_path, threads=1, seconds=0.2)
    assert set(found["parts"]) == {"prefill", "decode"} and found["difference"] < 1e-4


def test_a_peer_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(genai.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingRequirement, match=r"onnxruntime-genai is not installed\npip install \"infoprune-export\[dev\]\""):
        genai.measure(genai.DENSE, tmp_path, threads=1, seconds=0.2)


def test_exports_take_turns_in_processes_of_their_own(tmp_path, monkeypatch):
    started = []

    def run(line, **options):
        started.append(line[2])
        took = {"seconds": len(started), "peak_mib": 100.0 if line[2] == "ours" else 400.0, "files": {}}
        return subprocess.CompletedProcess(line, 0, stdout=f"chatter\n{json.dumps(took)}\n", stderr="")

    monkeypatch.setattr(exports.subprocess, "run", run)
    found = exports.measure(Path("model"), tmp_path)
    assert started == ["ours", "transformers"] * 3
    assert found["ours"]["seconds"] == 3 and found["time_ratio"] == 3 / 4 and found["memory_ratio"] == 0.25


@pytest.mark.slow
@pytest.mark.parametrize("side", exports.SIDES)
def test_an_export_says_what_it_took(side, small_model, tmp_path):
    done = subprocess.run([sys.executable, exports.__file__, side, small_model, tmp_path], capture_output=True, text=True, check=True)
    took = json.loads(done.stdout.splitlines()[-1])
    assert took["seconds"] > 0 and took["peak_mib"] > 100 and any(name.endswith("data") for name in took["files"])


def test_each_side_is_opened_first_in_half_of_the_openings():
    opened = []
    samples = openings.sampled(["a", "b"], lambda name: opened.append(name) or (lambda: float(name == "a")), seconds=0, warmup_rounds=0)
    assert opened == list("abbaabba")
    assert set(samples["a"]) == {1.0} and set(samples["b"]) == {0.0} and len(samples["a"]) == len(samples["b"]) >= openings.OPENINGS


def test_slices_have_true_sizes():
    shape = slices.slice_of(4)
    assert (shape.layers, shape.vision_layers, shape.hidden, shape.ffn, shape.prompt) == (4, 5, 4096, 11008, 640)


def test_figures_and_table():
    assert bench_speed.figures(FOUND) == [
        {"name": "llava7b.prefill.efficiency", "value": 0.825},
        {"name": "tiny.end_to_end.speedup", "value": 2.0},
    ]
    text = bench_speed.table(FOUND, [{"what": "smol", "reason": "not built"}], 2)
    assert "| LLaVA-1.5-7B, slices | prefill | 10 ms | 4 ms | 2.50x | 0.330 | 82% |" in text
    assert "| tiny-llava | end_to_end | 10 ms | 5 ms | 2.00x | 0.330 | 66% |" in text
    assert "- Not measured: smol (not built)" in text and "peer" not in text


def test_figures_and_table_of_peers_and_cache():
    peer = {"ours": TIMES, "genai": {"median_ms": 8.0}, "over_genai": 1.25}
    took, ratios = {"seconds": 4.0, "peak_mib": 500.0}, (("tiny-llava", 1.0), ("smol-llava", 0.5))
    found = {
        "frameworks": {"ours": TIMES, "torch": {"median_ms": 20.0}, "over_torch": 0.5, "not_measured": "torch.compile: no compiler"},
        "dense": {"parts": {"prefill": peer, "decode": peer}},
        "decode": {
            "capacity": {"256": TIMES, "4096": TIMES},
            "capacity_slope": 1.0,
            "length": {"100": TIMES, "4000": {"median_ms": 12.0}},
            "length_fit": 0.99,
        },
        "export": {"checkpoints": {n: {"ours": took, "transformers": took, "time_ratio": r, "memory_ratio": r} for n, r in ratios}},
    }
    checks = {x["name"]: x["value"] for x in bench_speed.figures(found)}
    assert checks["export.time_ratio"] == 0.5
    assert list(checks) == [
        "smol.end_to_end.over_torch",
        "decode.capacity_slope",
        "decode.length_fit",
        "export.time_ratio",
        "export.memory_ratio",
        "dense.prefill.over_genai",
        "dense.decode.over_genai",
    ]
    text = bench_speed.table(found, [], 2)
    assert "| smol-llava: end to end | PyTorch, eager | 10 ms | 20 ms | 0.50 |" in text
    assert "| Llama, 8 layers of 768: decode | onnxruntime-genai's graph | 10 ms | 8 ms | 1.25 |" in text
    assert "| ms | 10 | 12 |" in text and "ratio 1.000" in text


def test_figures_and_table_of_int4_weights():
    assert bench_speed.figures({"int4": INT4}) == [
        {"name": "int4.size_ratio", "value": 0.21},
        {"name": "int4.decode_speedup", "value": 2.5},
        {"name": "int4.accuracy_drop_points", "value": 0.5},
    ]
    text = bench_speed.table({"int4": INT4}, [], 2)
    assert "| decode | 10 ms | 4 ms | 2.50x | 0.160 |" in text
    assert "lose 0.50 points of accuracy (original, compressed, int4: vqa 0.950, 0.900, 0.895)" in text


def test_int4_slices_are_timed_in_turn_and_a_bundle_is_read(tmp_path, monkeypatch):
    def command(*line):
        out = line[line.index("--out") + 1]
        out.mkdir()
        task = {"original": 1.0, "compressed": 0.9, "quantised": 0.88, "n": 10}
        report = {"size": {"compressed_bytes": 100, "quantised_bytes": 20}, "accuracy": {"vqa": task, "gqa": task | {"quantised": 0.9}}}
        (out / "report.json").write_text(json.dumps(report))
        lines.append(line)

    lines = []
    monkeypatch.setattr(bundles, "command", command)
    found = weights.measure(SMALL, tmp_path, threads=1, seconds=0.1)
    assert lines[0][:7] == ("tiny-llava", "--flops", "0.33", "--train-steps", 240, "--weights", "int4")
    assert found["bundle"]["size_ratio"] == 0.2 and found["bundle"]["drop_points"] == pytest.approx(1)
    assert list(found["parts"]) == ["vision", "prefill", "decode"]
    for part, x in found["parts"].items():
        assert x["float"]["n"] == x["int4"]["n"] >= 3
        assert x["speedup"] == x["float"]["median_ms"] / x["int4"]["median_ms"]
        assert 0.1 < x["bytes_ratio"] < (0.7 if part == "vision" else 0.3)  # the smaller, the more is patches and positions


def test_a_section_that_fails_is_named_and_the_rest_is_written(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("exit code 2: no such recipe")

    monkeypatch.setattr(bundles, "measure", fail)
    assert bench_speed.main(["--only", "tiny", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["checks"] == []
    assert json.loads((tmp_path / "results.json").read_text())["not_measured"] == [
        {"what": "tiny", "reason": "RuntimeError: exit code 2: no such recipe"}
    ]
    assert "exit code 2" in (tmp_path / "table.md").read_text()


def test_what_is_not_asked_for_stays_with_its_commit(tmp_path, monkeypatch):
    before = {name: section | {"commit": "earlier"} for name, section in FOUND.items()}
    (tmp_path / "results.json").write_text(json.dumps({"sections": before}))
    monkeypatch.setattr(bundles, "measure", lambda *arguments: FOUND["tiny"])
    assert bench_speed.main(["--only", "tiny", "--out", str(tmp_path)]) == 0
    sections = json.loads((tmp_path / "results.json").read_text())["sections"]
    assert sections["llava7b"] == before["llava7b"] and sections["tiny"]["commit"] != "earlier"
    assert len(json.loads((tmp_path / "summary.json").read_text())["checks"]) == 2
    assert "LLaVA-1.5-7B" in (tmp_path / "table.md").read_text()
