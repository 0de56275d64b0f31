"""The command line: options, help, exit codes. What the verbs do is elsewhere."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from infoprune_export import __version__
from infoprune_export.errors import InfoPruneError

TARGETS = click.Choice(["onnx", "ort", "trt"])


class _Verbs(click.Group):
    """A group whose verb `export` may be left out."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["export", *args]
        return super().parse_args(ctx, args)


class _Fraction(click.ParamType):
    name = "FRACTION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
        if not 0 < number <= 1:
            self.fail(f"{value} is not a fraction kept: above 0, and at most 1 (1 exports unchanged)", param, ctx)
        return number


class _Share(_Fraction):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if number == 1:
            self.fail("1 keeps all of the time: leave the option out, or ask for less", param, ctx)
        return number


class _Archs(click.ParamType):
    name = "SM,SM"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        return value if isinstance(value, list) else [x.strip().lower() for x in value.split(",") if x.strip()]


class _PlanFile(click.Path):
    """A plan's file, named by itself or by the directory that `plan` wrote, or a bundle."""

    name = "PLAN"

    def __init__(self) -> None:
        super().__init__(path_type=Path, exists=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = super().convert(value, param, ctx)
        if path.is_dir() and not (path / "plan.json").is_file():
            self.fail(f"{path} holds no plan.json", param, ctx)
        return path / "plan.json" if path.is_dir() else path


class _Cpus(click.ParamType):
    """Numbers of CPUs."""

    name = "CPUS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        from infoprune_export.validation.affinity import parse

        try:
            return parse(value)
        except ValueError:
            self.fail(f"{value!r} is not a list of CPUs; write numbers and ranges, such as 0,2-3", param, ctx)


def _options(*names: str) -> Callable:
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
        "--flops", type=_Fraction(), help="Fraction of the FLOPs kept, 0 < F <= 1; 1 exports unchanged.  [default: the recipe's, else 1]"
    ),
    "latency": click.option(
        "--latency",
        type=_Share(),
        help="Instead of --flops: fraction kept of a request's time, measured on this machine with ONNX Runtime, 0 < L < 1.",
    ),
    "scope": click.option(
        "--scope", type=click.Choice(["all", "vision", "language"]), help="What the fraction is of, and what may be cut.  [default: all]"
    ),
    "dtype": click.option(
        "--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Type of the graphs.  [default: fp32 for ort on CPU, fp16 for trt]"
    ),
    "weights": click.option(
        "--weights",
        type=click.Choice(["int8", "int4"]),
        help="Also quantise the compressed network's matrices, block by block, beside its float graphs.  [default: the recipe's, else off]",
    ),
    "out": click.option("--out", type=click.Path(path_type=Path), help="Output directory.  [default: build/<name>]"),
    "gpu_arch": click.option(
        "--gpu-arch",
        "archs",
        type=_Archs(),
        default=[],
        help="Architectures for TensorRT, one engine file each.  [default: the GPUs present, else sm80,sm86,sm89,sm120]",
    ),
    "calibration": click.option(
        "--calibration", type=click.Path(path_type=Path), help="Directory or file in an official format (VQAv2, TextVQA, GQA)."
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
    "plan": click.option("--plan", "plan_file", type=_PlanFile(), help="Apply this plan (file or directory) instead of making one."),
    "dry_run": click.option("--dry-run", is_flag=True, help="Print the plan, write nothing."),
    "original": click.option(
        "--original/--no-original", default=None, help="Keep the original's graphs in the bundle.  [default: while under 2 GB]"
    ),
    "resume": click.option("--resume/--no-resume", default=True, show_default=True, help="Go on where an interrupted run stopped."),
    "seed": click.option("--seed", type=int, default=0, show_default=True),
    "threads": click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]"),
    "max_drop": click.option("--max-drop", type=float, metavar="POINTS", help="Gate: exit 1 if accuracy falls by more."),
    "min_speedup": click.option("--min-speedup", type=float, metavar="X", help="Gate: exit 1 if end to end is not this much faster."),
    "engine": click.option("--engine", type=TARGETS, help="Which engine to use.  [default: ort, else onnx]"),
    "json": click.option("--json", "as_json", is_flag=True, help="Results as JSON on stdout, progress as JSON lines on stderr."),
    "verbose": click.option("-v", "--verbose", count=True, help="Show warnings of libraries; -vv shows tracebacks."),
    "quiet": click.option("-q", "--quiet", is_flag=True, help="No progress."),
}


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "--version", prog_name="infoprune-export")
def cli() -> None:
    """Makes a vision-language model smaller and faster, ready to deploy.

    \b
      infoprune-export tiny-llava --target ort --target trt --flops 0.6
      infoprune-export llava --flops 0.33 --calibration DIR
      infoprune-export validate build/tiny-llava

    MODEL is a recipe name (see `recipes`), a recipe file, a model directory or a hub id org/name.
    """


@cli.command()
@_options("model", "target", "flops", "latency", "scope", "dtype", "weights", "out", "gpu_arch", "calibration", "samples")
@_options("train_steps", "plan", "random_weights", "dry_run", "original", "resume", "spill", "seed", "device", "threads", "max_drop")
@_options("min_speedup", "json", "verbose", "quiet")
def export(model: str, plan_file: Path | None, dry_run: bool, as_json: bool, **given: Any) -> None:
    """Compress MODEL, export it, build its engines and validate them (the main job)."""
    from infoprune_export import job, launched, pipeline

    recipe, options, progress = _job(model, given, plan=plan_file, original=given["original"], resume=given["resume"], archs=given["archs"])
    if dry_run:
        job.require_export()
        with job.Job(recipe, options, progress) as work:
            return _show_plan(work.decide(), as_json)
    if not launched.is_first():
        return pipeline.assist(recipe, options)
    bundle, report = pipeline.export_bundle(recipe, options, progress)
    _show_report(bundle.path, report, as_json)


@cli.command()
@_options("model", "flops", "latency", "scope", "out", "calibration", "samples", "train_steps", "random_weights")
@_options("spill", "seed", "device", "threads", "json", "verbose", "quiet")
def plan(model: str, as_json: bool, **given: Any) -> None:
    """Decide what to keep of MODEL; write plan.json and its factors."""
    from infoprune_export import pipeline

    recipe, options, progress = _job(model, given, suffix=".plan")
    result = pipeline.write_plan(recipe, options, progress)
    _show_plan(result, as_json)
    _say(f"written: {options.out}/plan.json and factors.safetensors")


@cli.command()
@click.argument("plan_file", metavar="PLAN", type=_PlanFile())
@click.option(
    "--to", "to", required=True, metavar="MODEL|BUNDLE", help="The original model, or a bundle that holds its graphs (needs no PyTorch)."
)
@_options("out", "calibration", "samples", "seed", "device", "threads", "verbose", "quiet")
def apply(plan_file: Path, to: str, **given: Any) -> None:
    """Apply PLAN to a model's PyTorch weights, or to a bundle's original graphs."""
    from infoprune_export import application
    from infoprune_export.bundle import MANIFEST

    if (Path(to) / MANIFEST).is_file():
        out = given["out"] or Path("build") / f"{Path(to).name}.applied"
        application.to_graphs(plan_file, Path(to), out)
    else:
        recipe, options, progress = _job(to, given, suffix=".applied", plan=plan_file)
        application.to_model(recipe, options, progress)
        out = options.out
    _say(f"written: {out}")


@cli.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--target", "targets", type=click.Choice(["ort", "trt"]), multiple=True, required=True, help="What to build; repeatable.")
@_options("weights", "gpu_arch", "verbose", "quiet")
def build(directory: Path, targets: tuple[str, ...], weights: str | None, archs: list[str], **given: Any) -> None:
    """Build engines from a bundle's graphs, on this device; needs no PyTorch."""
    from infoprune_export.engines.build import build_bundle

    progress = _progress(given)
    for target in targets:
        for path in build_bundle(directory, target, weights=weights, archs=archs, progress=progress):
            _say(str(path))


@cli.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--original", "original", metavar="DIR0", type=click.Path(path_type=Path), help="Bundle of the original, if DIR does not hold it."
)
@_options("threads", "max_drop", "min_speedup", "json", "verbose", "quiet")
def validate(directory: Path, original: Path | None, as_json: bool, **given: Any) -> None:
    """Measure a bundle against its original; write report.json and report.html."""
    from infoprune_export.bundle import Bundle
    from infoprune_export.validation.validate import validate_bundle

    bundle = Bundle.open(directory)
    progress = _progress(given)
    report = validate_bundle(
        bundle,
        original=Bundle.open(original) if original else None,
        threads=given["threads"],
        max_drop=given["max_drop"],
        min_speedup=given["min_speedup"],
        notify=progress.note,
        progress=progress.counter(),
    )
    report.write(directory, bundle.plan())
    _show_report(directory, report, as_json)


@cli.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--seconds", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="Measuring time per part.")
@click.option("--profile-layers", "layers", is_flag=True, help="Time the original's layers instead, by what is kept, for --latency.")
@click.option("--cpus", type=_Cpus(), help="Run on these CPUs alone, such as 0,2-3.  [default: all]")
@_options("engine", "threads", "json", "verbose", "quiet")
def bench(
    directory: Path,
    seconds: float,
    layers: bool,
    cpus: list[int] | None,
    engine: str | None,
    threads: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Time a bundle and its original, interleaved."""
    if cpus:
        from infoprune_export.validation.affinity import pin

        pin(cpus)
    from infoprune_export.bundle import Bundle
    from infoprune_export.validation.bench import bench_bundle, profile_bundle

    progress = _progress(given)
    if layers:
        if engine not in (None, "ort"):
            raise click.UsageError(f"--profile-layers measures with ort, not with {engine}.")
        from infoprune_export.validation.summary import layer_table

        table = profile_bundle(Bundle.open(directory), threads=threads, seconds=seconds, progress=progress.counter())
        return click.echo(table.model_dump_json(indent=1)) if as_json else _print(layer_table(table))
    engines = None if engine is None else [engine]
    result = bench_bundle(Bundle.open(directory), engines=engines, threads=threads, seconds=seconds, progress=progress.counter())
    _print_json(result.as_dict()) if as_json else _print(result.table())


@cli.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--image", "images", type=click.Path(path_type=Path), multiple=True, help="An image file; repeatable.")
@click.option("--prompt", required=True, help="The question; <image> marks an image's place, the front when absent.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--raw", is_flag=True, help="Take the prompt as it is, without the model's template.")
@_options("engine", "threads", "verbose", "quiet")
def generate(
    directory: Path,
    images: tuple[Path, ...],
    prompt: str,
    max_new_tokens: int,
    raw: bool,
    engine: str | None,
    threads: int | None,
    **given: Any,
) -> None:
    """Answer a prompt about images from a bundle; needs no PyTorch."""
    from infoprune_export.runtime.generate import generate as stream

    for piece in stream(directory, images, prompt, engine=engine, max_new_tokens=max_new_tokens, threads=threads, raw=raw):
        click.echo(piece, nl=False)
    click.echo()


@cli.command()
@click.argument("path", metavar="PLAN|DIR|GRAPH", type=click.Path(path_type=Path))
@_options("json", "verbose")
def inspect(path: Path, as_json: bool, **given: Any) -> None:
    """Show what a plan keeps, what a bundle holds, or what a graph consists of."""
    from infoprune_export.inspect import describe

    facts, tables = describe(path)
    if as_json:
        _print_json(facts)
    else:
        for table in tables:
            _print(table)


@cli.command()
@_options("json")
def recipes(as_json: bool) -> None:
    """List the recipes that come with the package."""
    from infoprune_export.recipe import packaged, read

    found = {name: read(path) for name, path in packaged().items()}
    if as_json:
        return _print_json({name: {"model": r.model, "flops": r.flops, "targets": r.targets} for name, r in found.items()})
    for name, r in found.items():
        click.echo(f"{name:<14} {r.model:<32} keeps {r.budget}; {r.workload}")


@cli.command()
@_options("json", "verbose")
def doctor(as_json: bool, **given: Any) -> None:
    """Say what this machine can build and run, and the install line for what it cannot."""
    from infoprune_export.engines.machine import machine_report

    report = machine_report()
    if as_json:
        return _print_json(report.as_dict())
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in report.as_rows():
        table.add_row(*map(escape, row))
    _print(table)


def _job(model: str, given: dict[str, Any], *, suffix: str = "", **extra: Any) -> tuple[Any, Any, Any]:
    """Recipe with overrides, options and progress of a verb that takes a MODEL."""
    from infoprune_export.material import Options
    from infoprune_export.resolution import resolve

    progress = _progress(given)
    recipe = resolve(model, given, warn=lambda line: _say(line, warning=True))
    out = given.get("out") or Path("build") / (recipe.name + suffix)
    options = Options(out=out, seed=given["seed"], threads=given["threads"], device=given["device"], **extra)
    options.random_weights, options.spill = given.get("random_weights", False), given.get("spill")
    return recipe, options, progress


def _progress(given: dict[str, Any]) -> Any:
    from infoprune_export.progress import Events, Silent, Terminal

    if given.get("quiet"):
        return Silent()
    return Events() if click.get_current_context().params.get("as_json") else Terminal()


def _show_plan(plan: Any, as_json: bool) -> None:
    if as_json:
        return click.echo(plan.to_json())
    from infoprune_export.inspect import plan_tables

    for table in plan_tables(plan):
        _print(table)


def _show_report(directory: Path, report: Any, as_json: bool) -> None:
    if as_json:
        click.echo(report.to_json())
    else:
        from infoprune_export.validation.summary import summary_table

        _print(summary_table(report))
        _say(f"bundle: {directory}    report: {directory}/report.html")
    report.raise_for_gates()


def _print(renderable: Any) -> None:
    from rich.console import Console

    Console(highlight=False).print(renderable)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1))


def _say(line: str, warning: bool = False) -> None:
    click.secho(("warning: " if warning else "") + line, err=True, fg="yellow" if warning else None)


def _quieten(verbosity: int) -> None:
    """Keeps third-party chatter out of sight unless asked for; has to run before those libraries are imported."""
    if verbosity:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def main(args: list[str] | None = None) -> None:
    """Runs the command line and exits with the codes 0, 1, 2, 3, 4, 70 or 130 (see README)."""
    args = sys.argv[1:] if args is None else args
    verbosity = sum(a.count("v") for a in args if a.startswith("-v") and set(a[1:]) == {"v"}) + args.count("--verbose")
    _quieten(verbosity)
    try:
        cli.main(args, prog_name="infoprune-export", standalone_mode=False)
    except InfoPruneError as e:
        _fail(str(e), e.exit_code, verbosity)
    except click.UsageError as e:
        e.show()
        sys.exit(2)
    except click.ClickException as e:
        _fail(e.format_message(), 2, verbosity)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; the same command goes on from here", 130, 0)
    except BrokenPipeError:
        sys.exit(0)
    except MemoryError:
        _fail("out of memory\nuse a machine with more memory, or fewer --samples", 4, verbosity)
    except Exception as e:
        if type(e).__name__ == "OutOfMemoryError":  # PyTorch's, which this module does not import
            _fail("out of memory on the GPU\nuse --device cpu, or a GPU with more memory", 4, verbosity)
        _fail(
            f"internal error, {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}\nrun again with -vv and report what it prints",
            70,
            verbosity,
        )


def _fail(message: str, code: int, verbosity: int) -> None:
    if verbosity >= 2:
        import traceback

        traceback.print_exc()
    click.secho("error: ", err=True, fg="red", bold=True, nl=False)
    click.echo(message, err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
