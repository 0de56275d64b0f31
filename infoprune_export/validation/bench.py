"""Times of a bundle's engines and of its original's, and nothing else: the `bench` verb."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infoprune_export.bundle import Bundle
from infoprune_export.recipe import Workload
from infoprune_export.runtime.session import EngineName
from infoprune_export.timetable import TimeTable
from infoprune_export.validation.baseline import find_baseline
from infoprune_export.validation.report import Report
from infoprune_export.validation.stand_ins import Setting
from infoprune_export.validation.table_cache import measure_and_keep
from infoprune_export.validation.validate import Notify, Progress, Run

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Bench:
    """What was timed; `report` holds latencies, their settings, the machine, and what could not be timed."""

    report: Report

    def as_dict(self) -> dict[str, Any]:
        """The parts of report.json that a benchmark fills."""
        return self.report.model_dump(mode="json", include={"workload", "latency", "latency_settings", "machine", "not_measured"})

    def table(self) -> RenderableType:
        """Order statistics, within 80 columns."""
        from infoprune_export.validation.summary import latency_table

        return latency_table(self.report)


def bench_bundle(
    bundle: Bundle,
    *,
    engines: Sequence[EngineName] | None = None,
    workload: Workload | None = None,
    original: Bundle | None = None,
    threads: int | None = None,
    seconds: float = 5.0,
    notify: Notify = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> Bench:
    """Times a bundle's engines, the original in turn with them; arguments and errors are those of `validate_bundle`."""
    workload = workload or bundle.manifest.workload
    run = Run(bundle, find_baseline(bundle, original), threads, notify, progress)
    inputs = run.inputs(workload)
    runnable = [variant for variant, _ in run.sessions(engines, ("latency",))]
    run.measure_latency(run.preferred(runnable), inputs, workload, seconds)
    run.describe_machine()
    return Bench(run.report)


def profile_bundle(
    bundle: Bundle, *, threads: int | None = None, seconds: float = 5.0, progress: Progress = lambda what, done, total: None
) -> TimeTable:
    """Measures the time table of a bundle's original on this machine and keeps it for `--latency`; see `profile.measure_table`."""
    setting = Setting(bundle.plan().anatomy, bundle.manifest.workload, bundle.manifest.dtypes[0], threads)
    return measure_and_keep(setting, seconds=seconds, progress=progress)
