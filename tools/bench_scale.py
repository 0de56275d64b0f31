#!/usr/bin/env python3
"""Measures what large models take on a small machine: memory, time, disk, and what a killed run costs.

    python tools/bench_scale.py                     # into benchmarks/scale; a quiet machine, 70 GB of disk, some six hours
    python tools/bench_scale.py --only scaling      # one section; what OUT has of the others stays
    python tools/bench_scale.py --quick --out DIR   # a network of 0.1 billion parameters and its kills, in minutes

All networks have random weights. A section that cannot be measured says why; its checks are absent.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("scaling", "factor", "kill", "llava7b")
QUICK = ("scaling", "factor", "kill")
SAMPLES, FLOPS = 8, 0.33
KILLS, QUICK_KILLS = 10, 3


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.1 billion parameters, a small matrix, fewer kills")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="one section; may be repeated")
    parser.add_argument("--size", action="append", help="of the section scaling, such as 0.3; may be repeated (default: all)")
    parser.add_argument(
        "--kills", type=int, help=f"in all; what OUT has of the same code counts (default: {KILLS}, {QUICK_KILLS} with --quick)"
    )
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where results go (default: benchmarks/scale, build/scale/quick with --quick)")
    args = parser.parse_args(arguments)
    args.out = args.out or (ROOT / "build" / "scale" / "quick" if args.quick else ROOT / "benchmarks" / "scale")
    args.only = args.only or list(QUICK if args.quick else SECTIONS)
    return args


def scaling(work: Path, name: str) -> dict[str, Any]:
    """A run of one size: parameters, bytes of the largest layer in float32, what compressing took, and all of the process tree."""
    from scale.runs import Run
    from scale.shapes import SIZES, counted

    config = SIZES[name].write(work / f"config-{name}")
    run = Run(str(config), work / f"scaling-{name}", SAMPLES, FLOPS)
    result = run.whole()
    print(f"  {name}: {result['seconds']:.0f} s, {result['tree_bytes'] / 2**30:.2f} GiB", flush=True)
    shutil.rmtree(run.out)
    return counted(config / "config.json") | {
        "resources": result["report"]["resources"],
        "tree_bytes": result["tree_bytes"],
        "seconds": result["seconds"],
    }


def killing(work: Path, size: str, tries: int, before: dict[str, Any]) -> dict[str, Any]:
    """One more kill beside those before of the same size and code, up to so many; the run that is left alone comes first.

    See `runs.killed_once_more`.
    """
    from quality.versions import code_version
    from scale.runs import Run, killed_once_more, undisturbed
    from scale.shapes import SIZES

    run = Run(str(SIZES[size].write(work / f"config-{size}")), work / "kill", SAMPLES, FLOPS)
    same = {"size": size, "code": code_version((ROOT / "infoprune_export").rglob("*.py"))}
    if {name: before.get(name) for name in same} != same:
        return same | undisturbed(run)
    return killed_once_more(run, before) if before["tried"] < tries else before


def line(sizes: list[float], values: list[float]) -> dict[str, float]:
    """A straight line through points, and how much of their spread it explains (R^2)."""
    import numpy as np

    x, y = np.array(sizes), np.array(values)
    slope, level = np.polyfit(x, y, 1)
    left = y - (slope * x + level)
    return {"slope": float(slope), "level": float(level), "r2": float(1 - (left @ left) / ((y - y.mean()) @ (y - y.mean())))}


def figures(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks that were measured, by the names that summary.json has."""
    from scale import llava7b

    values: dict[str, float] = {}
    if len(points := _points(found)) > 2:
        values["scaling.time_fit"] = line([x["parameters"] for x in points], [_seconds(x) for x in points])["r2"]
        memory = [x["resources"]["memory_bytes"]["measured"] for x in points]
        values["scaling.memory_growth_gib"] = (memory[-1] - memory[0]) / 2**30
        values["scaling.layer_growth_gib"] = (points[-1]["layer_bytes"] - points[0]["layer_bytes"]) / 2**30
    if "kill" in found:
        values |= {f"kill.{name}": found["kill"][name] for name in ("identical", "tried")}
    if "factor" in found:
        values |= {"factor.speedup_over_svdllm": found["factor"]["speedup"], "factor.error_over_svdllm": found["factor"]["error"]}
    if "llava7b" in found:
        values |= llava7b.checks(found["llava7b"])
    return [{"name": name, "value": round(value, 4)} for name, value in values.items()]


def _points(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every size that was measured, in ascending order."""
    points = list(found.get("scaling", {}).get("sizes", {}).values())
    if "parameters" in (largest := found.get("llava7b", {})):
        points.append(largest | {"resources": largest["run"]["report"]["resources"]})
    return sorted(points, key=lambda x: x["parameters"])


def _seconds(point: dict[str, Any]) -> float:
    return point["resources"]["seconds"]["measured"]


def table(found: dict[str, Any], not_measured: list[dict[str, str]]) -> str:
    """The results for people."""
    lines = ["<!-- written by tools/bench_scale.py -->", "# Large models on a small machine", ""]
    lines += ["Random weights, 8 calibration samples, 0.33 of the FLOPs kept, fp16 graphs; memory without pages of mapped files.", ""]
    if points := _points(found):
        lines += ["| parameters | compressing and exporting | calibration | algebra | files | peak memory | predicted | largest layer |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for x in points:
            parts, memory = x["resources"]["parts"], x["resources"]["memory_bytes"]
            times = " | ".join(f"{t / 60:.1f} min" for t in (_seconds(x), parts["calibration"], parts["algebra"], parts["files"]))
            sizes = " | ".join(f"{b / 2**30:.2f} GiB" for b in (memory["measured"], memory["predicted"], x["layer_bytes"]))
            lines.append(f"| {x['parameters'] / 1e9:.2f} billion | {times} | {sizes} |")
    if len(points) > 2:
        fit = line([x["parameters"] for x in points], [_seconds(x) for x in points])
        further = ", ".join(f"{(fit['slope'] * n * 1e9 + fit['level']) / 3600:.1f} h for {n} billion" for n in (13, 70))
        lines += ["", f"Time follows a straight line with R^2 = {fit['r2']:.3f}; drawn on, which is an extrapolation: {further}."]
    if "factor" in found:
        x = found["factor"]
        lines += [
            "",
            f"A pair of rank {x['rank']} for a matrix of {x['d_out']} x {x['d_in']}: {x['ours_seconds']:.1f} s, SVD-LLM's procedure ",
        ]
        lines[-1] += f"{x['svd_llm_seconds']:.1f} s ({x['speedup']:.1f}x), error {x['error']:.5f} of its."
    if "kill" in found:
        x = found["kill"]
        lines += [
            "",
            f"Killed at random moments: {x['tried']} runs of {x['size']} billion parameters, {x['identical']} came to the same bytes.",
        ]
    lines += [f"- Not measured: {x['what']} ({x['reason']})" for x in not_measured]
    return "\n".join(lines) + "\n"


def write(out: Path, found: dict[str, Any], not_measured: list[dict[str, str]]) -> None:
    """Writes summary.json, results.json and table.md."""
    from quality.versions import commit

    from infoprune_export.engines.machine import machine_report
    from infoprune_export.versions import library_versions

    head = {"commit": commit(), "machine": machine_report().description(), "versions": library_versions()}
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("summary.json", head | {"checks": figures(found)}),
        ("results.json", head | {"sections": found, "not_measured": not_measured}),
    ):
        (out / name).write_text(json.dumps(content, indent=1) + "\n")
    (out / "table.md").write_text(table(found, not_measured))


def main(arguments: list[str] | None = None) -> int:
    """Runs what is asked for; 0 if it ran."""
    args = parse(arguments)
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    from quality.versions import commit
    from scale import factor, llava7b
    from scale.shapes import SIZES
    from sections import Sections

    work = ROOT / "build" / "scale" / "work"
    work.mkdir(parents=True, exist_ok=True)
    earlier = json.loads((args.out / "results.json").read_text())["sections"] if (args.out / "results.json").is_file() else {}
    sizes = args.size or (["0.1"] if args.quick else list(SIZES))
    matrix = (
        {"d_in": 1536, "d_out": 4096, "rank": 256, "rounds": 2} if args.quick else {"d_in": 4096, "d_out": 11008, "rank": 640, "rounds": 5}
    )
    run, wanted = Sections(), args.only

    def measure(name: str, section: Callable[[], dict[str, Any]]) -> None:
        """Runs a section and writes down what is known by then: what is measured after it may take hours."""
        run.section(name, section)
        write(args.out, earlier | {n: x | {"commit": commit()} for n, x in run.found.items()}, run.not_measured)

    def known(name: str) -> dict[str, Any]:
        return run.found.get(name) or earlier.get(name, {})

    def with_size(size: str) -> dict[str, Any]:
        return {"sizes": known("scaling").get("sizes", {}) | {size: scaling(work, size)}}

    try:
        for size in sizes if "scaling" in wanted else ():
            measure("scaling", partial(with_size, size))
        if "factor" in wanted:
            measure("factor", lambda: factor.measure(**matrix, threads=args.threads))
        if "kill" in wanted:
            size, tries = ("0.1", args.kills or QUICK_KILLS) if args.quick else ("1", args.kills or KILLS)
            for _ in range(1 + tries):
                measure("kill", lambda: killing(work, size, tries, known("kill")))
        if "llava7b" in wanted:
            measure("llava7b", lambda: llava7b.measure(work, SAMPLES, args.threads))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(args.out / "table.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
