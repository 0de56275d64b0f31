"""What can be written on the command line: types of values, and the options that verbs share, each declared once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

TARGETS = click.Choice(["onnx", "ort", "trt"])


class Fraction(click.ParamType):
    name = "FRACTION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
        if not 0 < number <= 1:
            self.fail(f"{value} is not a fraction kept: above 0, and at most 1 (1 exports unchanged)", param, ctx)
        return number


class Share(Fraction):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if number == 1:
            self.fail("1 keeps all of the time: leave the option out, or ask for less", param, ctx)
        return number


class Archs(click.ParamType):
    name = "SM,SM"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        return value if isinstance(value, list) else [x.strip().lower() for x in value.split(",") if x.strip()]


class PlanFile(click.Path):
    """A plan's file, named by itself or by the directory that `plan` wrote, or a bundle."""

    name = "PLAN"

    def __init__(self) -> None:
        super().__init__(path_type=Path, exists=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = super().convert(value, param, ctx)
        if path.is_dir() and not (path / "plan.json").is_file():
            self.fail(f"{path} holds no plan.json", param, ctx)
        return path / "plan.json" if path.is_dir() else path


class Cpus(click.ParamType):
    """Numbers of CPUs."""

    name = "CPUS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        from infoprune_export.validation.affinity import parse

        try:
            return parse(value)
        except ValueError:
            self.fail(f"{value!r} is not a list of CPUs; write numbers and ranges, such as 0,2-3", param, ctx)


def options(*names: str) -> Callable:
    """Adds shared options by name, so that each is declared once."""

    def add(command: Callable) -> Callable:
        for name in reversed(names):
            command = SHARED[name](command)
        return command

    return add


SHARED: dict[str, Callable] = {
    "model": click.argument("model"),
    "target": click.option(
        "--target",
        "targets",
        type=TARGETS,
        multiple=True,
        help="What to build; repeatable. onnx/ is always written.  [default: the recipe's, else ort]",
    ),
    "flops": click.option(
        "--flops", type=Fraction(), help="Fraction of the FLOPs kept, 0 < F <= 1; 1 exports unchanged.  [default: the recipe's, else 1]"
    ),
    "latency": click.option(
        "--latency",
        type=Share(),
        help="Instead of --flops: fraction kept of a request's time, measured on this machine with ONNX Runtime, 0 < L < 1.",
    ),
    "scope": click.option(
        "--scope", type=click.Choice(["all", "vision", "language"]), help="What the fraction is of, and what may be cut.  [default: all]"
    ),
    "dtype": click.option(
        "--dtype",
        type=click.Choice(["fp32", "fp16", "bf16"]),
        help="Type of the graphs.  [default: the recipe's, else fp16 for trt and fp32 for others]",
    ),
    "weights": click.option(
        "--weights",
        type=click.Choice(["int8", "int4"]),
        help="Also quantise the compressed network's matrices, block by block, beside its float graphs.  [default: the recipe's, else off]",
    ),
    "out": click.option(
        "--out",
        type=click.Path(path_type=Path),
        help="Output directory.  [default: build/<name>, of plan and apply with .plan and .applied]",
    ),
    "gpu_arch": click.option(
        "--gpu-arch",
        "archs",
        type=Archs(),
        default=[],
        help="Architectures for TensorRT, one engine file each.  [default: the GPUs present, else sm80,sm86,sm89,sm120]",
    ),
    "calibration": click.option(
        "--calibration",
        type=click.Path(path_type=Path),
        help="Directory (its training questions first) or file in an official format (VQAv2, TextVQA, GQA), or tiny:NAME.",
    ),
    "samples": click.option("--samples", type=click.IntRange(min=1), help="Calibration questions.  [default: the recipe's, else 64]"),
    "train_steps": click.option(
        "--train-steps",
        type=click.IntRange(min=0),
        help="Steps of training after compression, on the recipe's training data, else on the calibration data; 0 for none.  "
        "[default: the recipe's, else 0]",
    ),
    "random_weights": click.option(
        "--random-weights",
        is_flag=True,
        help="Random weights of the model's true shapes and synthetic data, to plan time, memory and engines; only a config is needed.",
    ),
    "device": click.option(
        "--device", metavar="NAME", help="Where statistics, factors and training run: cpu, cuda, cuda:1.  [default: best present]"
    ),
    "spill": click.option(
        "--spill",
        type=click.Path(path_type=Path, file_okay=False),
        help="Directory for hidden states while compressing.  [default: beside --out]",
    ),
    "plan": click.option("--plan", "plan_file", type=PlanFile(), help="Apply this plan (file or directory) instead of making one."),
    "dry_run": click.option("--dry-run", is_flag=True, help="Print the plan, write nothing."),
    "original": click.option(
        "--original/--no-original", default=None, help="Keep the original's graphs in the bundle.  [default: while under 2 GB]"
    ),
    "resume": click.option("--resume/--no-resume", default=True, show_default=True, help="Go on where an interrupted run stopped."),
    "seed": click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws questions and labels."),
    "threads": click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]"),
    "max_drop": click.option("--max-drop", type=float, metavar="POINTS", help="Gate: exit 1 if accuracy falls by more."),
    "min_speedup": click.option("--min-speedup", type=float, metavar="X", help="Gate: exit 1 if end to end is not this much faster."),
    "seconds": click.option(
        "--seconds",
        type=click.FloatRange(min=0.1),
        default=5.0,
        show_default=True,
        help="Measuring time per part, original and compressed together.",
    ),
    "engine": click.option("--engine", type=TARGETS, help="Which engine to use.  [default: ort, else onnx; bench: all that run]"),
    "json": click.option("--json", "as_json", is_flag=True, help="Results as JSON on stdout, progress as JSON lines on stderr."),
    "verbose": click.option("-v", "--verbose", count=True, help="Show warnings of libraries; -vv shows tracebacks."),
    "quiet": click.option("-q", "--quiet", is_flag=True, help="No progress."),
}
