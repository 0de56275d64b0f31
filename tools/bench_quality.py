#!/usr/bin/env python3
"""Measures how well compressed networks answer: ours against what others published, on the models of this project.

    python tools/bench_quality.py                        # everything; goes on where a killed run stopped
    python tools/bench_quality.py --only tiny.free       # one stage; or a group (tiny.free.0.5), or a method (ours)
    python tools/bench_quality.py --report               # measures nothing, writes what there is
    python tools/bench_quality.py --quick --out DIR      # tiny-llava at 0.6 and 0.33, one seed, in minutes
    python tools/bench_quality.py --again 12             # 12 recorded rows, drawn at random, once more: do they come to the same?

Rows are kept in a file of their own (--rows) under names that hold model, criterion, data and code; results.json,
summary.json, table.md and the figure are written from those that belong to the model and the code as they are now.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

ROOT = Path(__file__).resolve().parents[1]
RECORDED = ROOT / "benchmarks" / "quality"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny-llava without training at 0.6 and 0.33, one seed")
    parser.add_argument("--out", type=Path, help="where results go (default: benchmarks/quality, build/quality/quick with --quick)")
    parser.add_argument("--rows", type=Path, help="file of rows (default: OUT/rows.jsonl)")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="stage, group or method; may be repeated")
    parser.add_argument("--report", action="store_true", help="measure nothing; write what has been measured")
    parser.add_argument(
        "--again", type=int, metavar="N", help="measure N rows of today's code anew and hold them against the recorded ones"
    )
    parser.add_argument("--workers", type=int, default=2, help="rows measured at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1, which the workers share (default: %(default)s)")
    args = parser.parse_args(arguments)
    args.out = args.out or (ROOT / "build" / "quality" / "quick" if args.quick else RECORDED)
    args.rows = args.rows or args.out / "rows.jsonl"
    return args


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; 0 if it ran, 1 if a row could not be measured."""
    args = parse(arguments)
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # this checkout, whatever is installed
    from quality.run import run, run_again, run_quick

    return (run_again if args.again else run_quick if args.quick else run)(args)


if __name__ == "__main__":
    sys.exit(main())
