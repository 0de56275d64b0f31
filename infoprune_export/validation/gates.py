"""The checks of a report that decide the exit code."""

from __future__ import annotations

from infoprune_export.validation.records import Gate
from infoprune_export.validation.report import Report


def judge(report: Report, max_drop: float | None = None, min_speedup: float | None = None) -> dict[str, Gate]:
    """The gates of a report: numerics always, the others when asked for.

    Where a bundle has quantised weights, accuracy and speed-up are theirs, never the float network's in their place.

    A gate whose figure could not be measured does not pass: a check that was asked for and not made is no assurance.

    Args:
        report: With its measurements filled in.
        max_drop: Largest loss of accuracy allowed on any task, in points.
        min_speedup: Smallest end-to-end speed-up allowed on any engine measured.
    """
    failed = [name for name, record in report.numerics.items() if not record.passed]
    total = len(report.numerics)
    measured = f"{', '.join(failed)} failed" if failed else f"{total} of {total} passed" if total else "not measured"
    gates = {"numerics": Gate(required="all checks pass", measured=measured, passed=total > 0 and not failed)}
    if max_drop is not None:
        points = {task: a.quantised_drop_points if report.quantisation else a.drop_points for task, a in report.accuracy.items()}
        drops = {task: lost for task, lost in points.items() if lost is not None}
        task = max(drops, key=drops.__getitem__, default=None)
        gates["max_drop"] = Gate(
            required=f"at most {max_drop:g} points on any task",
            measured="not measured"
            if task is None
            else f"{abs(drops[task]):.2f} points {'lost' if drops[task] > 0 else 'gained'} on {task}",
            # A loss of exactly the points allowed passes, whatever the last binary digit of a difference of means.
            passed=task is not None and drops[task] <= max_drop + 1e-9,
        )
    if min_speedup is not None:
        ends = {engine: parts["end_to_end"] for engine, parts in report.latency.items() if "end_to_end" in parts}
        factors = {engine: end.quantised_speedup if report.quantisation else end.speedup for engine, end in ends.items()}
        speedups = {engine: factor for engine, factor in factors.items() if factor is not None}
        engine = min(speedups, key=speedups.__getitem__, default=None)
        gates["min_speedup"] = Gate(
            required=f"at least {min_speedup:g}x end to end",
            measured="not measured" if engine is None else f"{speedups[engine]:.2f}x on {engine}",
            passed=engine is not None and speedups[engine] >= min_speedup,
        )
    return gates
