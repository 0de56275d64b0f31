#!/usr/bin/env python3
"""Measures how much of the cut in FLOPs arrives as time, through ONNX Runtime on the CPU.

    python tools/bench_speed.py                     # into benchmarks/speed; a quiet machine, some 10 minutes, 12 GB of memory
    python tools/bench_speed.py --quick --out DIR   # slices of one layer, and tiny-llava alone

With --only, what OUT has of other sections stays; each says at which commit it was measured. Every ratio is of medians from
one run in which both sides take turns. Slices of LLaVA-1.5-7B have true sizes and random weights, each part compressed to
0.33 of its own FLOPs; tiny-llava and smol-llava are whole bundles at 0.33.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

ROOT = Path(__file__).resolve().parents[1]
LAYERS, QUICK_LAYERS = 4, 1


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"slices of {QUICK_LAYERS} layer, no smol-llava")
    parser.add_argument("--only", action="append", choices=["llava7b", "tiny", "smol", "int4"], help="one section; may be repeated")
    parser.add_argument("--threads", type=int, default=2, help="of ONNX Runtime (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each part of each network (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where results go (default: benchmarks/speed, build/speed/quick with --quick)")
    args = parser.parse_args(arguments)
    args.out = args.out or (ROOT / "build" / "speed" / "quick" if args.quick else ROOT / "benchmarks" / "speed")
    args.only = args.only or (["llava7b", "tiny", "int4"] if args.quick else ["llava7b", "tiny", "smol", "int4"])
    return args


def earlier(path: Path, now: list[str]) -> dict[str, Any]:
    """Sections of an earlier run that are not measured now."""
    sections = json.loads(path.read_text())["sections"] if path.is_file() else {}
    return {name: section for name, section in sections.items() if name not in now}


def figures(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks that were measured, by the names that summary.json has."""
    checks = [{"name": f"llava7b.{part}.efficiency", "value": x["efficiency"]} for part, x in _slices(found).items()]
    for name in ("tiny", "smol"):
        if name in found:
            checks.append({"name": f"{name}.end_to_end.speedup", "value": found[name]["latency"]["ort"]["end_to_end"]["speedup"]})
    if "int4" in found:
        bundle, decode = found["int4"]["bundle"], found["int4"]["parts"]["decode"]
        checks += [
            {"name": "int4.size_ratio", "value": bundle["size_ratio"]},
            {"name": "int4.decode_speedup", "value": decode["speedup"]},
            {"name": "int4.accuracy_drop_points", "value": bundle["drop_points"]},
        ]
    return [c | {"value": round(c["value"], 3)} for c in checks]


def table(found: dict[str, Any], not_measured: list[dict[str, str]], threads: int) -> str:
    """The results for people."""
    lines = ["<!-- written by tools/bench_speed.py -->", "# Time after compression", ""]
    lines += [f"ONNX Runtime on the CPU, {threads} threads, fp32, batch 1; medians, original and compressed in turn.", ""]
    lines += ["| network | part | original | compressed | speed-up | kept | of the ideal |", "|---|---|---|---|---|---|---|"]
    for part, x in _slices(found).items():
        before, after = x["dense"]["median_ms"], x["compressed"]["median_ms"]
        lines.append(_row("LLaVA-1.5-7B, slices", part, before, after, x["kept"]))
    for name in ("tiny", "smol"):
        for part, x in found.get(name, {}).get("latency", {}).get("ort", {}).items():
            lines.append(_row(f"{name}-llava", part, x["original"]["median_ms"], x["compressed"]["median_ms"], x["flops_kept"]))
    lines += ["", "Kept is of FLOPs; of decoding on the slices, of the bytes that a token reads."]
    lines += _int4_lines(found["int4"]) if "int4" in found else []
    lines += [f"- Not measured: {x['what']} ({x['reason']})" for x in not_measured]
    return "\n".join(lines) + "\n"


def _int4_lines(found: dict[str, Any]) -> list[str]:
    bundle = found["bundle"]
    lines = ["", "## int4 weights on top", "", "| slices, compressed | float | int4 | speed-up | bytes of weights |"]
    lines.append("|---|---|---|---|---|")
    for part, x in found["parts"].items():
        before, after = x["float"]["median_ms"], x["int4"]["median_ms"]
        lines.append(f"| {part} | {before:.4g} ms | {after:.4g} ms | {x['speedup']:.2f}x | {x['bytes_ratio']:.3f} |")
    tasks = ", ".join(f"{name} {t['original']:.3f}, {t['compressed']:.3f}, {t['quantised']:.3f}" for name, t in bundle["tasks"].items())
    size, lost = bundle["size_ratio"], bundle["drop_points"]
    lines += ["", f"tiny-llava's graphs with int4 weights have {size:.3f} of the float ones' bytes, embedding included, and"]
    return [*lines, f"lose {lost:.2f} points of accuracy (original, compressed, int4: {tasks})."]


def _slices(found: dict[str, Any]) -> dict[str, Any]:
    return found.get("llava7b", {"parts": {}})["parts"]


def _row(network: str, part: str, before: float, after: float, kept: float) -> str:
    speedup = before / after
    return f"| {network} | {part} | {before:.4g} ms | {after:.4g} ms | {speedup:.2f}x | {kept:.3f} | {100 * kept * speedup:.0f}% |"


def main(arguments: list[str] | None = None) -> int:
    """Runs what is asked for; 0 if it ran."""
    args = parse(arguments)
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.chdir(ROOT)  # recipes name models and data relative to where one works
    from quality.versions import commit
    from sections import Sections
    from speed import bundles, slices, weights

    from infoprune_export.engines.machine import machine_report
    from infoprune_export.pipeline import library_versions

    work = ROOT / "build" / "speed" / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    run = Sections()
    try:
        if "llava7b" in args.only:
            shape = slices.slice_of(QUICK_LAYERS if args.quick else LAYERS)
            run.section("llava7b", lambda: slices.measure(shape, work / "llava7b", args.threads, args.seconds))
        for name in ("tiny", "smol"):
            if name in args.only:
                run.section(name, lambda name=name: bundles.measure(f"{name}-llava", work, args.threads, args.seconds))
        if "int4" in args.only:
            shape = slices.slice_of(QUICK_LAYERS if args.quick else LAYERS)
            run.section("int4", lambda: weights.measure(shape, work / "int4", args.threads, args.seconds, quick=args.quick))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    head = {"commit": commit(), "machine": machine_report().description(), "versions": library_versions()}
    found = earlier(args.out / "results.json", args.only) | {name: x | {"commit": head["commit"]} for name, x in run.found.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("summary.json", head | {"checks": figures(found)}),
        ("results.json", head | {"threads": args.threads, "sections": found, "not_measured": run.not_measured}),
    ):
        (args.out / name).write_text(json.dumps(content, indent=1) + "\n")
    (args.out / "table.md").write_text(table(found, run.not_measured, args.threads))
    print(args.out / "table.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
