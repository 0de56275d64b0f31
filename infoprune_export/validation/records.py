"""The figures of a report, each with what it depends on: the parts of report.json's schema.

Accuracies and fractions are between 0 and 1, times are milliseconds, and a figure that could not be measured is null and has its
reason in `report.Report.not_measured`.
"""

from __future__ import annotations

from pydantic import Field

from infoprune_export.recipe import Workload
from infoprune_export.schema import Strict

PARTS = ("vision", "prefill", "decode", "end_to_end")


class ComponentNumerics(Strict):
    """One component of one engine against the same network in float arithmetic, on identical inputs: PyTorch in fp32, or for
    quantised weights its portable graph."""

    engine: str
    dtype: str
    max_abs: float | None = Field(description="largest absolute difference; null when it is not a number")
    max_rel: float | None = Field(description="the same over the largest absolute value of the reference")
    cosine: float | None = Field(description="smallest cosine similarity of any row with the reference's")
    passed: bool
    message: str | None = Field(None, description="what failed")


class GenerationNumerics(Strict):
    """Greedy continuations of one engine against those of the same network in float arithmetic."""

    engine: str
    dtype: str
    prompts: int
    identical_token_ids: int = Field(description="prompts whose every token id is the reference's")
    near_ties: int = Field(0, description="prompts that part from the reference's where the engine cannot tell two tokens apart")
    passed: bool
    message: str | None = None


class Distance(Strict):
    """One component with quantised weights against the float network's in PyTorch: what quantising did, which is no fault."""

    max_rel: float = Field(description="largest absolute difference over the largest absolute value of the float network")
    cosine: float = Field(description="smallest cosine similarity of any row")


class Quantisation(Strict):
    """The compressed network with quantised weights, one for each type of graph."""

    weights: str = Field(description="int8 or int4")
    block_size: int
    distance: dict[str, Distance] = Field({}, description="component and precision, such as decoder_model_merged_q4")
    identical_token_ids: dict[str, int] = Field({}, description="precision to the prompts that both networks continue alike, of `prompts`")
    prompts: int = 0


class Interval(Strict):
    low: float
    high: float


class Accuracy(Strict):
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
        """Of the network with quantised weights where that was measured, to be shown; what gates want is in `gates.judge`."""
        return self.drop_points if self.quantised is None else self.quantised_drop_points


class Timing(Strict):
    """Order statistics of repeated runs, in milliseconds."""

    median_ms: float
    p90_ms: float
    p95_ms: float | None = Field(None, description="null in reports of early versions")
    p99_ms: float
    mean_ms: float
    min_ms: float
    max_ms: float
    n: int


class PartLatency(Strict):
    """One part of a request, original and compressed measured in turn in one run."""

    original: Timing | None
    compressed: Timing
    speedup: float | None = Field(description="median of the original over median of the compressed")
    quantised: Timing | None = Field(None, description="of the compressed network with quantised weights, in turn with the others")
    quantised_speedup: float | None = Field(None, description="median of the original over median of the quantised")
    flops_kept: float | None = Field(description="fraction of this very part's FLOPs kept")

    @property
    def final_speedup(self) -> float | None:
        """Of the network with quantised weights where that was measured, to be shown; what gates want is in `gates.judge`."""
        return self.speedup if self.quantised is None else self.quantised_speedup


class LatencySettings(Strict):
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


class Size(Strict):
    """Bytes of the three ONNX graphs with their weights, in the bundle's first dtype."""

    original_bytes: int | None
    compressed_bytes: int
    quantised_bytes: int | None = Field(None, description="with quantised weights, the float embedding included")


class Gate(Strict):
    """A check that decides the exit code."""

    required: str
    measured: str
    passed: bool


class NotMeasured(Strict):
    what: str
    reason: str


class Estimate(Strict):
    """A figure that was predicted before the work, and measured."""

    predicted: float
    measured: float | None = Field(None, description="null where an earlier run had done a part of the work")


class Resources(Strict):
    """What compressing and exporting took on the machine that made the bundle."""

    memory_bytes: Estimate = Field(description="peak of memory that no file lies behind")
    disk_bytes: Estimate = Field(description="peak of the work folder and of what --spill holds")
    seconds: Estimate = Field(description="what is predicted leaves training out")
    parts: dict[str, float] = Field(
        {}, description="of the seconds measured: calibration (running the data), algebra, training, files (reading, writing, tracing)"
    )
