"""From rows to checks: the figures that the project is judged by.

Accuracies are means over a model's tasks and over seeds; differences are in points, 100 times accuracy. The best
baseline at a budget is the pair with the highest mean on the test split: the comparison is against the best that any
of them did there. The spread is the sample standard deviation, over seeds, of ours minus that pair with the same seed
(the same calibration questions): how far the difference moves when the draw does.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from quality.methods import METHODS, OURS
from quality.rows import Row


class Results:
    """Rows of the test split, looked up by what they are compared within."""

    def __init__(self, rows: Iterable[Row], earlier: Sequence[tuple[str, str, int]] = ()):
        """
        Args:
            rows: To be looked up.
            earlier: Places of those that earlier code measured.
        """
        self.earlier = set(earlier)
        self._seeds: dict[tuple[str, str], dict[int, Row]] = {}
        for row in rows:
            if row.task.split == "test" and not row.failed:
                self._seeds.setdefault((row.task.group, row.task.method), {})[row.task.seed] = row

    def seeds(self, group: str, method: str) -> dict[int, float]:
        """Seed to mean accuracy over the model's tasks."""
        return {seed: row.mean for seed, row in sorted(self._seeds.get((group, method), {}).items())}

    def mean(self, group: str, method: str) -> float | None:
        """Mean over seeds; None where there is no row."""
        values = self.seeds(group, method).values()
        return statistics.fmean(values) if values else None

    def rows(self, group: str, method: str) -> list[Row]:
        return [row for _, row in sorted(self._seeds.get((group, method), {}).items())]

    def any(self, group: str) -> Row:
        """Some row of a group."""
        return next(row for (g, _), seeds in self._seeds.items() if g == group for row in seeds.values())

    def original(self, setting: str) -> float | None:
        return self.mean(f"{setting}.free.1", "original")

    def best_baseline(self, group: str) -> str | None:
        """The pair with the highest mean; None where no pair has a row."""
        means = {m.name: mean for m in METHODS.values() if m.kind == "pair" and (mean := self.mean(group, m.name)) is not None}
        return max(means, key=means.get) if means else None

    def groups(self) -> list[str]:
        return sorted({group for group, _ in self._seeds}, key=lambda g: (g.rsplit(".", 2)[0], g))

    def differences(self, group: str, other: str) -> list[float]:
        """Ours minus another method with the same seed, in points."""
        own, others = self.seeds(group, OURS.name), self.seeds(group, other)
        return [100 * (own[s] - others[s]) for s in own if s in others]


def checks(results: Results, compress_seconds: float | None) -> list[dict[str, Any]]:
    """Every check that was measured, as `{name, value}`; one that was not is absent.

    Args:
        results: Rows of one version of model and code.
        compress_seconds: Time to compress smol-llava, if it was taken.
    """
    found: dict[str, float | None] = {}
    for setting, budgets in (("tiny", ("0.8", "0.6", "0.5", "0.33")), ("smol", ("0.8", "0.6", "0.5"))):
        for budget in budgets:
            group = f"{setting}.free.{budget}"
            found[f"{group}.minus_best_baseline"] = minus_best(results, group)
            if setting == "tiny":
                found[f"{group}.spread"] = spread(results, group)
        found[f"{setting}.free.0.6.minus_original"] = minus_original(results, f"{setting}.free.0.6")
        found[f"{setting}.trained.0.33.minus_original"] = minus_original(results, f"{setting}.trained.0.33")
    found["tiny.trained.0.33.minus_best_baseline"] = minus_best(results, "tiny.trained.0.33")
    found["smol.compress_seconds"] = compress_seconds
    return [{"name": name, "value": round(value, 3)} for name, value in found.items() if value is not None]


def minus_best(results: Results, group: str) -> float | None:
    """Ours minus the best pair, in points, over the seeds that each has."""
    own, best = results.mean(group, OURS.name), results.best_baseline(group)
    return None if own is None or best is None else 100 * (own - results.mean(group, best))


def spread(results: Results, group: str) -> float | None:
    """Standard deviation over seeds of ours minus the best pair, in points; None with fewer than two seeds."""
    best = results.best_baseline(group)
    differences: Sequence[float] = results.differences(group, best) if best else ()
    return statistics.stdev(differences) if len(differences) > 1 else None


def minus_original(results: Results, group: str) -> float | None:
    """Ours minus the original, in points."""
    own, before = results.mean(group, OURS.name), results.original(group.partition(".")[0])
    return None if own is None or before is None else 100 * (own - before)
