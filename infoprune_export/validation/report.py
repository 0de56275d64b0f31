"""The report: what was asked, what was reached, what was measured on what, and what was not measured and why.

`Report` is the schema of report.json, `records` that of its figures.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from infoprune_export.bundle import Flops
from infoprune_export.errors import GateFailed, InputError
from infoprune_export.files import write_whole
from infoprune_export.plans import LatencyBudget, Plan, Source, TrainingRecord
from infoprune_export.recipe import Workload
from infoprune_export.schema import Strict, first_problem
from infoprune_export.validation.records import (
    Accuracy,
    ComponentNumerics,
    Gate,
    GenerationNumerics,
    LatencySettings,
    NotMeasured,
    PartLatency,
    Quantisation,
    Resources,
    Size,
)
from infoprune_export.workspace import full_disk

REPORT_JSON, REPORT_HTML = "report.json", "report.html"


class Report(Strict):
    schema_version: Literal[1] = 1
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
            FullDisk: the disk is full.
        """
        from infoprune_export.validation.page import report_page

        if (directory / REPORT_JSON).is_file():
            with contextlib.suppress(InputError):
                self._keep(Report.read(directory / REPORT_JSON))
        page = report_page(self, plan)
        try:
            write_whole(directory / REPORT_JSON, self.to_json())
            write_whole(directory / REPORT_HTML, page)
        except OSError as e:
            raise full_disk(e, directory, mend="make space and run it again") or _not_writable(directory) from e

    def _keep(self, earlier: Report) -> None:
        self.resources = self.resources or earlier.resources
        at = earlier.measured_at
        before = {task: a.model_copy(update={"measured_at": a.measured_at or at}) for task, a in earlier.accuracy.items()}
        self.accuracy = before | self.accuracy


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
