"""The checks for a GPU, on the CPU: the same way through, at toy sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import gpu_checks  # noqa: E402
from gpu import pytorch  # noqa: E402
from sections import Sections  # noqa: E402
from shapes import SHAPES, build, compress  # noqa: E402

from infoprune_export.compress.lowrank import LowRankLinear  # noqa: E402
from infoprune_export.models.families import find_anatomy  # noqa: E402
from infoprune_export.models.flops import count  # noqa: E402

CPU = torch.device("cpu")


def test_every_layer_of_a_compressed_network_keeps_about_the_same_share():
    model = build(SHAPES["small"], CPU, torch.float32)
    whole = find_anatomy(model)
    plan = compress(model, SHAPES["small"], 0.5)
    assert 0.4 < plan.budget.predicted <= 0.5
    assert count(whole, plan.workload).total == plan.budget.original_flops
    for tower in ("vision", "language"):
        kept = [len(d.heads) for d in plan.layers if d.tower == tower]
        assert max(kept) - min(kept) <= 1
    assert sum(isinstance(m, LowRankLinear) for m in model.modules()) == len(plan.low_rank_sites()) > 0


def test_the_published_shape_is_that_of_the_recipe():
    with torch.device("meta"):
        anatomy = find_anatomy(build(SHAPES["llava7b"], torch.device("meta"), torch.float16))
    assert anatomy.geometry.image_tokens == 576
    assert (len(anatomy.vision.layers), len(anatomy.language.layers), anatomy.language.hidden) == (23, 32, 4096)
    assert sum(m.d_in * m.d_out for x in anatomy.language.layers for m in x.ffn.matrices.values()) == 32 * 3 * 4096 * 11008


def test_all_parts_are_measured_until_time_is_up():
    found = pytorch.measure(SHAPES["small"], CPU, (1, 2), ["eager"], lambda: False)
    assert {(part, *sorted(batches)) for part, batches in found["times"].items()} == {(part, "1", "2") for part in pytorch.PARTS}
    x = found["times"]["decode"]["2"]["eager"]
    assert x["speedup"] == x["dense"]["median_ms"] / x["compressed"]["median_ms"]
    assert sorted(x["dense"]) == ["max_ms", "median_ms", "min_ms", "n", "tokens_per_second"]
    assert found["weights_gib"]["compressed"] < found["weights_gib"]["dense"] and found["kept"] <= 0.33
    names = [c["name"] for c in gpu_checks.figures({"torch.small": found})]
    assert len(names) == 6 and "torch.small.decode.b2.eager.speedup" in names
    early = pytorch.measure(SHAPES["small"], CPU, (1,), ["eager"], lambda: True)
    assert early["times"] == {} and gpu_checks.figures({"torch.small": early}) == []


def test_a_mode_that_fails_is_written_down_and_costs_the_others_nothing(monkeypatch):
    def no_compiler(*arguments, **options):
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    found = pytorch.measure(SHAPES["small"], CPU, (1,), ["eager", "compile"], lambda: False)
    for part in pytorch.PARTS:
        assert found["times"][part]["1"]["compile"] == {"failed": "RuntimeError: no C++ compiler"}
        assert found["times"][part]["1"]["eager"]["speedup"] > 0
    assert len(gpu_checks.figures({"torch.small": found})) == 3


def test_decoding_is_from_the_same_place_every_time():
    model = build(SHAPES["small"], CPU, torch.float32)
    with torch.no_grad():
        run, tokens = pytorch._decode(model, SHAPES["small"], 2, "eager")
        first = run()
        assert tokens == 2 and all(torch.equal(run(), first) for _ in range(3))


def test_a_section_that_fails_is_written_down_and_costs_the_others_nothing(capsys):
    checks = Sections(60)
    checks.section("broken", lambda: 1 / 0)
    checks.section("whole", lambda: {"figure": 1})
    assert checks.found == {"whole": {"figure": 1}}
    assert checks.not_measured == [{"what": "broken", "reason": "ZeroDivisionError: division by zero"}]
    assert "SKIPPED | broken" in capsys.readouterr().out
    late = Sections(0)
    late.section("late", lambda: pytest.fail("began after its time"))
    assert late.not_measured == [{"what": "late", "reason": "no time was left"}]


def run(*arguments: object) -> subprocess.CompletedProcess:
    line = [sys.executable, str(ROOT / "tools" / "gpu_checks.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)


def test_the_command_writes_what_it_measured_and_names_what_it_did_not(tmp_path):
    done = run("--device", "cpu", "--minutes", 0.01, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert set(result) == {"commit", "machine", "versions", "checks", "sections", "not_measured"}
    assert result["machine"]["device"] == "cpu"
    assert {x["what"] for x in result["not_measured"]} >= {"CUDA graphs, torch.compile", "train", "engines"}


def test_one_section_leaves_what_was_measured_of_the_others(tmp_path):
    (tmp_path / "cpu.json").write_text(json.dumps({"sections": {"train": {"seconds": 7.0, "commit": "earlier"}}}))
    assert run("--device", "cpu", "--minutes", 1, "--only", "torch", "--out", tmp_path).returncode == 0
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert result["sections"]["train"] == {"seconds": 7.0, "commit": "earlier"}
    assert result["sections"]["torch.small"]["commit"] == result["commit"] and len(result["checks"]) == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_in_two_lines(tmp_path):
    done = run("--device", "cuda", "--out", tmp_path)
    assert done.returncode == 3 and len(done.stderr.strip().splitlines()) == 2
    assert "PyTorch sees no NVIDIA GPUs here" in done.stderr
    assert not list(tmp_path.iterdir())
