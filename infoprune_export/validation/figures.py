"""How figures are written for people, the same way in the terminal, on the page and in the card."""

from __future__ import annotations

from infoprune_export.validation.records import Accuracy, Interval, PartLatency
from infoprune_export.validation.report import Report

ABSENT = "-"
WHOSE = {"all": "its", "vision": "its vision tower's", "language": "its language model's"}
"""Budget scope to whose FLOPs a fraction is of; see `models.flops.DENOMINATORS` for the exact words."""
PART_NAMES = {"vision": "vision", "prefill": "prefill", "decode": "decode, a token", "end_to_end": "end to end"}


def duration(seconds: float) -> str:
    """`12 s`, `3 min 20 s`, `1 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def si(value: float, unit: str) -> str:
    """`8.9 TFLOP`, `14.3 MB`: three significant digits, powers of 1000."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale * 0.9995:
            return f"{significant(value / scale)} {prefix}{unit}"
    return f"{significant(value)} {unit}"


def significant(value: float) -> str:
    """Three significant digits without an exponent: 0.123, 1.23, 12.3, 1,234."""
    size = abs(value)
    decimals = 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return f"{value:,.{decimals}f}"


def milliseconds(value: float | None) -> str:
    return ABSENT if value is None else f"{significant(value)} ms"


def fraction(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"


def times(value: float | None) -> str:
    """A speed-up: `1.46x`."""
    return ABSENT if value is None else f"{value:.2f}x"


def interval(value: Interval | None, decimals: int = 3) -> str:
    return "" if value is None else f"{value.low:.{decimals}f} to {value.high:.{decimals}f}"


def drop(accuracy: Accuracy, final: bool = False) -> str:
    """Change of accuracy in points, with its sign: a loss is negative; of the `final` network, with quantised weights where it has any."""
    points = accuracy.final_drop_points if final else accuracy.drop_points
    return ABSENT if points is None else signed(-points)


def signed(points: float) -> str:
    """`+0.4`, `-2.5`, and `0.0` for what rounds to it."""
    rounded = round(points, 1)
    return f"{rounded:+.1f}" if rounded else "0.0"


def became_time(latency: PartLatency) -> float | None:
    """Share of a part's FLOP cut that became time: the speed-up over the ideal one, 1 / FLOPs kept."""
    return latency.speedup * latency.flops_kept if latency.speedup is not None and latency.flops_kept is not None else None


def largest_drop(report: Report) -> tuple[str, Accuracy] | None:
    """The task that lost most, where the original was measured."""
    compared = [(task, a) for task, a in report.accuracy.items() if a.final_drop_points is not None]
    return max(compared, key=lambda pair: pair[1].final_drop_points, default=None)


def latency_budget(report: Report) -> str:
    """`asked for 0.5 of the time, predicted 0.497, measured 0.512 (ort)`; of a report that has such a budget."""
    budget, measured = report.latency_budget, ", ".join(f"{fraction(x)} ({engine})" for engine, x in report.latency_kept.items())
    return f"asked for {budget.requested:g} of the time, predicted {fraction(budget.predicted)}, measured {measured or ABSENT}"


def by_reason(report: Report) -> dict[str, list[str]]:
    """What was not measured, under each reason once."""
    reasons: dict[str, list[str]] = {}
    for entry in report.not_measured:
        reasons.setdefault(entry.reason, []).append(entry.what)
    return reasons
