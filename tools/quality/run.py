"""A run of the benchmark from the command line's options to its files."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from quality import outputs
from quality.campaign import Crew, Stage, Tuned, only, quick_stage, stages
from quality.methods import METHODS, ORIGINAL
from quality.rows import Row, RowFile, Task, Versions
from quality.settings import SETTINGS
from quality.versions import ROOT

TIMED = Task("smol", "ours", 0.6, split=None)
TIMED_CORES = 2


def run(args: argparse.Namespace) -> int:
    """Measures what is asked for and missing, and writes what there is.

    Args:
        args: See `bench_quality.parse`.

    Returns:
        Exit code: 0, or 1 if a row could not be measured.
    """
    whole = _measurable()
    book, versions = RowFile(args.rows), Versions()
    tuned, broken = Tuned(book, versions), 0
    if not args.report:
        with Crew(args.workers, args.threads, book, versions, args.device) as crew:
            for stage in only(whole, args.only):
                crew.measure(f"{stage.name}, validation", tuned.needed(stage.tasks))
                crew.measure(stage.name, _filled(stage, tuned))
                _write(args, whole, book, versions, tuned)
        broken = crew.broken
        if not SETTINGS[TIMED.setting].absent() and any(fnmatch("smol.time", pattern) for pattern in args.only or ["*"]):
            with Crew(1, TIMED_CORES, book, versions) as alone:
                alone.measure("smol.time", [TIMED])
            broken += alone.broken
    _write(args, whole, book, versions, tuned)
    return 1 if broken else 0


def run_quick(args: argparse.Namespace) -> int:
    """The quick run; parameters are those that the full run recorded. See `run`."""
    book, versions = RowFile(args.rows), Versions()
    known = outputs.recorded_parameters(ROOT / "benchmarks" / "quality" / "results.json")
    notes, tasks, unknown = [outputs.quick_note()], [], []
    for task in quick_stage().tasks:
        which = (task.setting, task.method, task.budget)
        if task.method != ORIGINAL.name:
            if which not in known:
                unknown.append(f"{task.method} at {task.budget:g}")
            task = replace(task, parameters=known.get(which) or next(METHODS[task.method].candidates(task.budget)))
        tasks.append(task)
    if unknown:
        notes.append(
            f"No parameters are recorded for {', '.join(unknown)}: the first candidate is taken, "
            "with which published pairs do worse than tuned ones. Run the benchmark in full for a fair comparison."
        )
    with Crew(args.workers, args.threads, book, versions, args.device) as crew:
        crew.measure("quick", tasks)
    rows = [row for t in tasks if (row := book.get(versions.key_of(t)))]
    outputs.write(args.out, rows, [], None, notes)
    return 1 if crew.broken else 0


def run_again(args: argparse.Namespace) -> int:
    """Measures recorded rows anew, drawn at random among those of today's code, and writes down what came of it.

    What was recorded stays. See `run`.
    """
    book, versions = RowFile(args.rows), Versions()
    tuned, known = Tuned(book, versions), {}
    for stage in only(_measurable(), args.only):
        for task in _filled(stage, tuned):
            if (row := book.get(versions.key_of(task))) and not row.failed:
                known[row.key] = replace(row, task=task)
    drawn = random.SystemRandom().sample(list(known.values()), min(args.again, len(known)))
    with tempfile.TemporaryDirectory() as directory:
        anew = RowFile(Path(directory) / "rows.jsonl")
        with Crew(args.workers, args.threads, anew, versions, args.device) as crew:
            crew.measure("again", [row.task for row in drawn])
    outputs.write_again(args.out, args.only, [(row, found) for row in drawn if (found := anew.get(row.key))], len(known))
    return 1 if crew.broken else 0


def _measurable() -> list[Stage]:
    """The stages whose models are there; says which are not."""
    absent = {name: reason for name, setting in SETTINGS.items() if (reason := setting.absent())}
    for reason in absent.values():
        print(f"left out: {reason}", file=sys.stderr)
    return [s for s in stages() if s.tasks[0].setting not in absent]


def _filled(stage: Stage, tuned: Tuned) -> Iterable[Task]:
    for task in stage.tasks:
        try:
            yield tuned.filled(task)
        except LookupError:
            continue  # a candidate could not be measured, and has been told


def _write(args: argparse.Namespace, whole: Sequence[Stage], book: RowFile, versions: Versions, tuned: Tuned) -> None:
    """Writes every row of the whole proof that there is, whatever this run was asked for; earlier code's where today's has none."""
    rows: list[Row] = []
    for stage in whole:
        for task in _filled(stage, tuned):
            if row := book.get(versions.key_of(task)):
                rows.append(replace(row, task=task))  # two tasks may come to the same network under different names
    earlier = book.earlier(rows)
    timed = book.get(versions.key_of(TIMED)) if any(s.tasks[0].setting == TIMED.setting for s in whole) else None
    seconds = timed.seconds["compress"] if timed else None
    outputs.write(args.out, rows, outputs.tuned_record(tuned, whole), seconds, [], earlier)
