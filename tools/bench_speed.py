#!/usr/bin/env python3
"""Measures how much of the cut in FLOPs arrives as time, through ONNX Runtime on the CPU, and our dense engines against their peers.

    python tools/bench_speed.py                     # into benchmarks/speed; a quiet machine, some hour, 12 GB of memory
    python tools/bench_speed.py --quick --out DIR   # small slices and few seconds, without what needs smol-llava

With --only, what OUT has of other sections stays; each says at which commit it was measured. Every ratio is of medians from one
run in which the sides take turns.

    llava7b    slices of LLaVA-1.5-7B with true sizes and random weights, each part compressed to 0.33 of its own FLOPs
    tiny, smol whole bundles at 0.33
    frameworks smol-llava, dense, against PyTorch, eager and compiled
    dense      our decoder against the graph of onnxruntime-genai's builder, of one random Llama
    dense7b    the same, two layers of Llama-7B's sizes
    decode     a token by the tokens in the cache, and by the cache's capacity
    export     our export against `transformers.exporters`: time and peak memory
    int4       int4 weights on top of the compressed network
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

ROOT = Path(__file__).resolve().parents[1]
LAYERS, QUICK_LAYERS = 4, 1
SECTIONS = ("llava7b", "tiny", "smol", "frameworks", "dense", "dense7b", "decode", "export", "int4")
QUICK = ("llava7b", "tiny", "dense", "decode", "export", "int4")
CHECKPOINTS = {"tiny-llava": ROOT / "infoprune_export" / "models" / "tiny_llava", "smol-llava": ROOT / "build" / "smol-llava-model"}
"""What is exported; where both are, the larger one's ratios are the checks."""
SCALARS = (
    ("frameworks", "smol.end_to_end", ("over_torch", "over_torch_compile")),
    ("decode", "decode", ("capacity_slope", "length_fit")),
)
"""Section, first part of its checks' names, and the values it has under the rest."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help=f"slices of {QUICK_LAYERS} layer, without {', '.join(x for x in SECTIONS if x not in QUICK)}"
    )
    parser.add_argument("--only", action="append", choices=SECTIONS, help="one section; may be repeated")
    parser.add_argument("--threads", type=int, default=2, help="of ONNX Runtime (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each part of each network (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where results go (default: benchmarks/speed, build/speed/quick with --quick)")
    args = parser.parse_args(arguments)
    args.out = args.out or (ROOT / "build" / "speed" / "quick" if args.quick else ROOT / "benchmarks" / "speed")
    args.only = args.only or list(QUICK if args.quick else SECTIONS)
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
    for name, prefix, keys in SCALARS:
        checks += [{"name": f"{prefix}.{key}", "value": found[name][key]} for key in keys if key in found.get(name, {})]
    if "export" in found:
        checkpoint = list(found["export"]["checkpoints"])[-1]
        checks += [{"name": f"export.{x}", "value": found["export"]["checkpoints"][checkpoint][x]} for x in ("time_ratio", "memory_ratio")]
    for name in ("dense", "dense7b"):
        for part, x in found.get(name, {}).get("parts", {}).items():
            checks.append({"name": f"{name}.{part}.over_genai", "value": x["over_genai"]})
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
    if peers := _peers(found):
        lines += [
            "",
            "Dense, ours and a peer in turn:",
            "",
            "| what | peer | ours | peer's | ours / peer's |",
            "|---|---|---|---|---|",
            *peers,
        ]
    if "decode" in found:
        x = found["decode"]
        lines += ["", "A token of the small Llama by tokens in its cache, room for 4,096:", ""]
        lines += ["| tokens | " + " | ".join(x["length"]) + " |", "|---" * (1 + len(x["length"])) + "|"]
        lines += ["| ms | " + " | ".join(f"{t['median_ms']:.4g}" for t in x["length"].values()) + " |", ""]
        by_room = ", ".join(f"{room}: {t['median_ms']:.4g} ms" for room, t in x["capacity"].items())
        lines += [f"R^2 by a line {x['length_fit']:.4f}. By room at 100 tokens, {by_room}, ratio {x['capacity_slope']:.3f}."]
    lines += _int4_lines(found["int4"]) if "int4" in found else []
    lines += [""] * bool(not_measured)
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


def _peers(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, of in (("dense", "Llama, 8 layers of 768"), ("dense7b", "Llama-7B, 2 layers")):
        for part, x in found.get(name, {}).get("parts", {}).items():
            rows.append(_peer(f"{of}: {part}", "onnxruntime-genai's graph", x["ours"]["median_ms"], x["genai"]["median_ms"], "ms"))
    for side, peer in (("torch", "PyTorch, eager"), ("torch_compile", "PyTorch, torch.compile")):
        if side in found.get("frameworks", {}):
            times = [found["frameworks"][x]["median_ms"] for x in ("ours", side)]
            rows.append(_peer("smol-llava: end to end", peer, *times, "ms"))
    for checkpoint, x in found.get("export", {}).get("checkpoints", {}).items():
        for key, unit in (("seconds", "s"), ("peak_mib", "MiB")):
            sides = (x[side][key] for side in ("ours", "transformers"))
            rows.append(_peer(f"export of {checkpoint}", "transformers.exporters", *sides, unit))
    return rows


def _peer(what: str, peer: str, ours: float, theirs: float, unit: str) -> str:
    return f"| {what} | {peer} | {ours:.4g} {unit} | {theirs:.4g} {unit} | {ours / theirs:.2f} |"


def _row(network: str, part: str, before: float, after: float, kept: float) -> str:
    speedup = before / after
    return f"| {network} | {part} | {before:.4g} ms | {after:.4g} ms | {speedup:.2f}x | {kept:.3f} | {100 * kept * speedup:.0f}% |"


def _exports(measure: Callable[..., dict[str, Any]], work: Path, rounds: int, quick: bool) -> dict[str, Any]:
    """Exports of every checkpoint that is here; the quick run has the small one alone."""
    here = {name: path for name, path in CHECKPOINTS.items() if path.is_dir() and not (quick and name != "tiny-llava")}
    return {"checkpoints": {name: measure(path, work / name, rounds=rounds) for name, path in here.items()}}


def main(arguments: list[str] | None = None) -> int:
    """Runs what is asked for; 0 if it ran."""
    args = parse(arguments)
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.chdir(ROOT)  # recipes name models and data relative to where one works
    from quality.versions import commit
    from sections import Sections
    from speed import bundles, capacity, exports, frameworks, genai, slices, weights

    from infoprune_export.engines.machine import machine_report
    from infoprune_export.versions import library_versions

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
        if "frameworks" in args.only:
            run.section("frameworks", lambda: frameworks.measure("smol-llava", work / "frameworks", args.threads, args.seconds))
            if reason := run.found.get("frameworks", {}).get("not_measured"):
                run.skip("frameworks.torch_compile", reason)
        for shape in (genai.DENSE, genai.DENSE_7B):
            if shape.name in args.only:
                run.section(shape.name, lambda shape=shape: genai.measure(shape, work / shape.name, args.threads, args.seconds))
        if "decode" in args.only:
            run.section("decode", lambda: capacity.measure(work / "decode", args.threads, args.seconds))
        if "export" in args.only:
            run.section("export", lambda: _exports(exports.measure, work / "export", 1 if args.quick else 3, args.quick))
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
