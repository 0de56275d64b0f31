"""The checks of a report that decide the exit code."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from infoprune_export.validation.records import Gate
from infoprune_export.validation.report import Report

TASK = "accuracy."
"""What is not measured of a task has a name that begins so."""


def judge(report: Report, max_drop: float | None = None, min_speedup: float | None = None) -> dict[str, Gate]:
    """The gates of a report: numerics always, the others when asked for.

    Where a bundle has quantised weights, accuracy and speed-up are theirs, never the float network's in their place.

    A gate with a figure that could not be measured does not pass: a check that was asked for and not made is no assurance.

    Args:
        report: With its measurements filled in, and what could not be measured.
        max_drop: Largest loss of accuracy allowed on any task, in points.
        min_speedup: Smallest end-to-end speed-up allowed on any engine that was timed here.
    """
    failed = [name for name, record in report.numerics.items() if not record.passed]
    total = len(report.numerics)
    measured = f"{', '.join(failed)} failed" if failed else f"{total} of {total} passed" if total else "not measured"
    gates = {"numerics": Gate(required="all checks pass", measured=measured, passed=total > 0 and not failed)}
    if max_drop is not None:
        points = {task: a.quantised_drop_points if report.quantisation else a.drop_points for task, a in report.accuracy.items()}
        points |= {x.what.removeprefix(TASK): None for x in report.not_measured if x.what.startswith(TASK)}
        # A loss of exactly the points allowed passes, whatever the last binary digit of a difference of means.
        gates["max_drop"] = _worst(
            f"at most {max_drop:g} points on any task",
            points,
            max,
            lambda task, lost: f"{abs(lost):.2f} points {'lost' if lost > 0 else 'gained'} on {task}",
            lambda lost: lost <= max_drop + 1e-9,
        )
    if min_speedup is not None:
        ends = {engine: parts["end_to_end"] for engine, parts in report.latency.items() if "end_to_end" in parts}
        factors = {engine: end.quantised_speedup if report.quantisation else end.speedup for engine, end in ends.items()}
        gates["min_speedup"] = _worst(
            f"at least {min_speedup:g}x end to end",
            factors,
            min,
            lambda engine, factor: f"{factor:.2f}x on {engine}",
            lambda factor: factor >= min_speedup,
        )
    return gates


def _worst(
    required: str,
    figures: Mapping[str, float | None],
    worst: Callable[..., str],
    tell: Callable[[str, float], str],
    passes: Callable[[float], bool],
) -> Gate:
    """The gate of several figures, which holds for the worst of them and for none that is missing."""
    known = {name: x for name, x in figures.items() if x is not None}
    missing = [name for name in figures if name not in known]
    if not known:
        return Gate(required=required, measured="not measured", passed=False)
    name = worst(known, key=known.__getitem__)
    measured = tell(name, known[name]) + (f"; not measured: {', '.join(missing)}" if missing else "")
    return Gate(required=required, measured=measured, passed=not missing and passes(known[name]))
