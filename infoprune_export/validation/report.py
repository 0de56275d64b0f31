"""The report: what was asked, what was reached, what was measured on what, and what was not measured and why.

`Report` is the schema of report.json. Accuracies and fractions are between 0 and 1, times are milliseconds,
and a figure that could not be measured is null and has its reason under `not_measured`.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infoprune_export.bundle import Flops, write_atomically
from infoprune_export.errors import GateFailed, InputError, NotEnough
from infoprune_export.plans import LatencyBudget, Plan, Source, TrainingRecord
from infoprune_export.recipe import Workload, first_problem
from infoprune_export.workspace import is_full_disk

SCHEMA_VERSION = 1
REPORT_JSON, REPORT_HTML = "report.json", "report.html"
PARTS = ("vision", "prefill", "decode", "end_to_end")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ComponentNumerics(_Record):
    """One component of one engine against the same network in float arithmetic, on identical inputs: PyTorch in fp32, or for
    quantised weights its portable graph."""

    engine: str
    dtype: str
    max_abs: float | None = Field(description="largest absolute difference; null when it is not a number")
    max_rel: float | None = Field(description="the same over the largest absolute value of the reference")
    cosine: float | None = Field(description="smallest cosine similarity of any row with the reference's")
    passed: bool
    message: str | None = Field(None, description="what failed")


class GenerationNumerics(_Record):
    """Greedy continuations of one engine against those of the same network in float arithmetic."""

    engine: str
    dtype: str
    prompts: int
    identical_token_ids: int = Field(description="prompts whose every token id is the reference's")
    near_ties: int = Field(0, description="prompts that part from the reference's where the engine cannot tell two tokens apart")
    passed: bool
    message: str | None = None


class Distance(_Record):
    """One component with quantised weights against the float network's in PyTorch: what quantising did, which is no fault."""

    max_rel: float = Field(description="largest absolute difference over the largest absolute value of the float network")
    cosine: float = Field(description="smallest cosine similarity of any row")


class Quantisation(_Record):
    """The compressed network with quantised weights, one for each type of graph."""

    weights: str = Field(description="int8 or int4")
    block_size: int
    distance: dict[str, Distance] = Field({}, description="component and precision, such as decoder_model_merged_q4")
    identical_token_ids: dict[str, int] = Field({}, description="precision to the prompts that both networks continue alike, of `prompts`")
    prompts: int = 0


class Interval(_Record):
    low: float
    high: float


class Accuracy(_Record):
    """Official score of a task, through an exported engine, with 95% intervals."""

    original: float | None
    compressed: float
    n: int
    metric: str
    engine: str
    dtype: str
    original_interval: Interval | None = None
    compressed_interval: Interval
    drop_points: float | None = Field(None, description="original - compressed, in points (hundredths)")
    drop_points_interval: Interval | None = Field(None, description="of the paired difference, question by question")
    quantised: float | None = Field(None, description="with quantised weights; null where the bundle has none")
    quantised_interval: Interval | None = None
    quantised_drop_points: float | None = Field(None, description="original - quantised, in points")
    quantised_drop_points_interval: Interval | None = None
    measured_at: str | None = Field(None, description="when, where that is not when the report was made: an earlier one's, kept")

    @property
    def final_drop_points(self) -> float | None:
        """Of the network with quantised weights where that was measured, to be shown; what gates want is in `judge`."""
        return self.drop_points if self.quantised is None else self.quantised_drop_points


class Timing(_Record):
    """Order statistics of repeated runs, in milliseconds."""

    median_ms: float
    p90_ms: float
    p95_ms: float | None = Field(None, description="null in reports of early versions")
    p99_ms: float
    mean_ms: float
    min_ms: float
    max_ms: float
    n: int


class PartLatency(_Record):
    """One part of a request, original and compressed measured in turn in one run."""

    original: Timing | None
    compressed: Timing
    speedup: float | None = Field(description="median of the original over median of the compressed")
    quantised: Timing | None = Field(None, description="of the compressed network with quantised weights, in turn with the others")
    quantised_speedup: float | None = Field(None, description="median of the original over median of the quantised")
    flops_kept: float | None = Field(description="fraction of this very part's FLOPs kept")

    @property
    def final_speedup(self) -> float | None:
        """Of the network with quantised weights where that was measured, to be shown; what gates want is in `judge`."""
        return self.speedup if self.quantised is None else self.quantised_speedup


class LatencySettings(_Record):
    """What the latencies of one engine depend on."""

    dtype: str
    devices: dict[str, str] = Field({}, description="component to where it ran, cpu or cuda; empty in reports of early versions")
    threads: int | None = Field(description="null: the engine's own choice")
    workload: Workload
    seconds_per_part: float
    warmup_rounds: int
    cpus: list[int] | None = Field(None, description="those that the process may run on; null where the system does not say")
    load_average: float | None = Field(None, description="processes wanting a core in the minute before; times are noisy above the cores")
    transfers: str = "host to host: inputs and outputs are arrays in main memory"

    @property
    def where(self) -> str:
        """`cuda`, or `vision_encoder cuda, ..., decoder_model_merged cpu` where they differ; nothing for the CPU alone."""
        kinds = set(self.devices.values())
        if len(kinds) > 1:
            return ", ".join(f"{component} {device}" for component, device in self.devices.items())
        return "".join(kinds - {"cpu"})


class Size(_Record):
    """Bytes of the three ONNX graphs with their weights, in the bundle's first dtype."""

    original_bytes: int | None
    compressed_bytes: int
    quantised_bytes: int | None = Field(None, description="with quantised weights, the float embedding included")


class Gate(_Record):
    """A check that decides the exit code."""

    required: str
    measured: str
    passed: bool


class NotMeasured(_Record):
    what: str
    reason: str


class Estimate(_Record):
    """A figure that was predicted before the work, and measured."""

    predicted: float
    measured: float | None = Field(None, description="null where an earlier run had done a part of the work")


class Resources(_Record):
    """What compressing and exporting took on the machine that made the bundle."""

    memory_bytes: Estimate = Field(description="peak of memory that no file lies behind")
    disk_bytes: Estimate = Field(description="peak of the work folder and of what --spill holds")
    seconds: Estimate = Field(description="what is predicted leaves training out")
    parts: dict[str, float] = Field(
        {}, description="of the seconds measured: calibration (running the data), algebra, training, files (reading, writing, tracing)"
    )


class Report(_Record):
    schema_version: int = SCHEMA_VERSION
    tool: str
    name: str = Field(description="the recipe's name")
    source: Source
    random_weights: bool = False
    measured_at: str = Field(description="ISO 8601, UTC")
    workload: Workload
    flops: Flops
    latency_budget: LatencyBudget | None = Field(None, description="where time was asked for and not FLOPs")
    training: TrainingRecord | None = Field(None, description="how the compressed network was trained; null: not at all")
    quantisation: Quantisation | None = Field(None, description="how far quantised weights take the network; null: none are asked for")
    accuracy: dict[str, Accuracy] = {}
    numerics: dict[str, ComponentNumerics | GenerationNumerics] = {}
    latency: dict[str, dict[str, PartLatency]] = {}
    latency_settings: dict[str, LatencySettings] = {}
    size: Size
    resources: Resources | None = Field(None, description="what making the bundle took")
    gates: dict[str, Gate] = {}
    machine: dict[str, Any] = {}
    not_measured: list[NotMeasured] = []

    @property
    def latency_kept(self) -> dict[str, float]:
        """Engine to the fraction of the original's end-to-end time that the compressed network takes."""
        ends = {engine: parts["end_to_end"] for engine, parts in self.latency.items() if "end_to_end" in parts}
        return {engine: 1 / end.speedup for engine, end in ends.items() if end.speedup}

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates.values())

    def raise_for_gates(self) -> None:
        """Turns a failed gate into exit code 1.

        Raises:
            GateFailed: naming every gate that failed.
        """
        failed = [f"{name}: {gate.measured}, required {gate.required}" for name, gate in self.gates.items() if not gate.passed]
        if failed:
            raise GateFailed("; ".join(failed), mend="the bundle is kept; report.html in it says more")

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Report:
        """Reads report.json.

        Raises:
            InputError: missing, damaged or of another schema.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"cannot be read ({e})", where=path, mend="make it: infoprune-export validate DIR") from None
        except ValidationError as e:
            raise InputError(first_problem(e), where=path, mend="make it again: infoprune-export validate DIR") from None

    def write(self, directory: Path, plan: Plan | None = None) -> None:
        """Writes report.json and report.html, each whole or not at all.

        What making the bundle took is known to the first report alone, and data for accuracy may be on another machine: what is not known
        now is kept of the report that was there.

        Raises:
            InputError: the directory cannot be written.
            NotEnough: the disk is full.
        """
        from infoprune_export.validation.page import report_page

        if (directory / REPORT_JSON).is_file():
            with contextlib.suppress(InputError):
                self._keep(Report.read(directory / REPORT_JSON))
        page = report_page(self, plan)
        try:
            write_atomically(directory / REPORT_JSON, self.to_json())
            write_atomically(directory / REPORT_HTML, page)
        except OSError as e:
            if is_full_disk(e):
                raise NotEnough(
                    "the disk is full, or a file may not grow further", where=directory, mend="make space and run it again"
                ) from e
            raise _not_writable(directory) from e

    def _keep(self, earlier: Report) -> None:
        self.resources = self.resources or earlier.resources
        if not self.accuracy:
            at = earlier.measured_at
            self.accuracy = {task: a.model_copy(update={"measured_at": a.measured_at or at}) for task, a in earlier.accuracy.items()}


def check_writable(directory: Path) -> None:
    """Makes sure, before anything is measured, that the report can be put where it belongs.

    Raises:
        InputError: it cannot.
    """
    if not os.access(directory, os.W_OK | os.X_OK):
        raise _not_writable(directory)


def _not_writable(directory: Path) -> InputError:
    mend = "copy the bundle to where you may write, or look at its times alone: infoprune-export bench DIR"
    return InputError("the report cannot be written there", where=directory, mend=mend)


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
