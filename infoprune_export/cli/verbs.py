"""The verbs: each reads its options, calls what does the work, and shows what came of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from infoprune_export import __version__
from infoprune_export.cli.options import Cpus, PlanFile, options
from infoprune_export.cli.showing import print_json, say, show, show_figures, show_plan, show_report

READER_GONE = 128 + 13
"""What a shell tells of a command that SIGPIPE ended: `infoprune-export recipes | head -1`."""


class _Verbs(click.Group):
    """A group whose verb `export` may be left out."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["export", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click would end with 1, which is a gate's
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may Python complain when it flushes
            sys.exit(READER_GONE)


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
@options("model", "target", "flops", "latency", "scope", "dtype", "weights", "out", "gpu_arch", "calibration", "samples")
@options("train_steps", "plan", "random_weights", "dry_run", "original", "resume", "spill", "seed", "device", "threads", "max_drop")
@options("min_speedup", "seconds", "json", "verbose", "quiet")
def export(model: str, plan_file: Path | None, dry_run: bool, as_json: bool, **given: Any) -> None:
    """Compress MODEL, export it, build its engines and validate them (the main job)."""
    from infoprune_export import job, launched, pipeline, requirements

    recipe, options, progress = _job(model, given, plan=plan_file, original=given["original"], resume=given["resume"], archs=given["archs"])
    if dry_run:
        requirements.require_export()
        with job.Job(recipe, options, progress) as work:
            return show_plan(work.decide(), as_json)
    if not launched.is_first():
        return pipeline.assist(recipe, options)
    bundle, report = pipeline.export_bundle(recipe, options, progress)
    show_report(bundle.path, report, as_json)


@cli.command()
@options("model", "flops", "latency", "scope", "out", "calibration", "samples", "train_steps", "random_weights")
@options("spill", "seed", "device", "threads", "json", "verbose", "quiet")
def plan(model: str, as_json: bool, **given: Any) -> None:
    """Decide what to keep of MODEL; write plan.json and its factors."""
    from infoprune_export import pipeline

    recipe, options, progress = _job(model, given, suffix=".plan")
    result = pipeline.write_plan(recipe, options, progress)
    show_plan(result, as_json)
    say(f"written: {options.out}/plan.json and factors.safetensors")


@cli.command()
@click.argument("plan_file", metavar="PLAN", type=PlanFile())
@click.option(
    "--to", "to", required=True, metavar="MODEL|BUNDLE", help="The original model, or a bundle that holds its graphs (needs no PyTorch)."
)
@options("out", "calibration", "samples", "seed", "device", "threads", "verbose", "quiet")
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
    say(f"written: {out}")


@cli.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--target", "targets", type=click.Choice(["ort", "trt"]), multiple=True, required=True, help="What to build; repeatable.")
@options("weights", "gpu_arch", "verbose", "quiet")
def build(directory: Path, targets: tuple[str, ...], weights: str | None, archs: list[str], **given: Any) -> None:
    """Build engines from a bundle's graphs, on this device; needs no PyTorch."""
    from infoprune_export.engines.build import build_bundle

    progress = _progress(given)
    for target in targets:
        for path in build_bundle(directory, target, weights=weights, archs=archs, progress=progress):
            say(str(path))


@cli.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--original", "original", metavar="DIR0", type=click.Path(path_type=Path), help="Bundle of the original, if DIR does not hold it."
)
@options("threads", "max_drop", "min_speedup", "seconds", "json", "verbose", "quiet")
def validate(directory: Path, original: Path | None, as_json: bool, **given: Any) -> None:
    """Measure a bundle against its original; write report.json and report.html."""
    from infoprune_export.bundle import Bundle
    from infoprune_export.errors import InfoPruneError
    from infoprune_export.validation.report import check_writable
    from infoprune_export.validation.validate import validate_bundle

    bundle = Bundle.open(directory)
    check_writable(directory)
    progress = _progress(given)
    report = validate_bundle(
        bundle,
        original=Bundle.open(original) if original else None,
        threads=given["threads"],
        max_drop=given["max_drop"],
        min_speedup=given["min_speedup"],
        seconds=given["seconds"],
        notify=progress.note,
        progress=progress.counter(),
    )
    try:
        report.write(directory, bundle.plan())
    except InfoPruneError:
        show_figures(report, as_json)  # they took minutes to measure
        raise
    show_report(directory, report, as_json)


@cli.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--profile-layers", "layers", is_flag=True, help="Time the original's layers instead, by what is kept, for --latency.")
@click.option("--cpus", type=Cpus(), help="Run on these CPUs alone, such as 0,2-3.  [default: all]")
@options("seconds", "engine", "threads", "json", "verbose", "quiet")
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
        return click.echo(table.model_dump_json(indent=1)) if as_json else show(layer_table(table))
    engines = None if engine is None else [engine]
    result = bench_bundle(Bundle.open(directory), engines=engines, threads=threads, seconds=seconds, progress=progress.counter())
    print_json(result.as_dict()) if as_json else show(result.table())


@cli.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--image", "images", type=click.Path(path_type=Path), multiple=True, help="An image file; repeatable.")
@click.option("--prompt", required=True, help="The question; <image> marks an image's place, the front when absent.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--raw", is_flag=True, help="Take the prompt as it is, without the model's template.")
@options("engine", "threads", "verbose", "quiet")
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
@options("json", "verbose")
def inspect(path: Path, as_json: bool, **given: Any) -> None:
    """Show what a plan keeps, what a bundle holds, or what a graph consists of."""
    from infoprune_export.inspect import describe

    facts, tables = describe(path)
    if as_json:
        print_json(facts)
    else:
        for table in tables:
            show(table)


@cli.command()
@options("json")
def recipes(as_json: bool) -> None:
    """List the recipes that come with the package."""
    from infoprune_export.recipe import packaged, read

    found = {name: read(path) for name, path in packaged().items()}
    if as_json:
        return print_json({name: {"model": r.model, "flops": r.flops, "targets": r.targets} for name, r in found.items()})
    for name, r in found.items():
        click.echo(f"{name:<14} {r.model:<32} keeps {r.budget}; {r.workload}")


@cli.command()
@options("json", "verbose")
def doctor(as_json: bool, **given: Any) -> None:
    """Say what this machine can build and run, and the install line for what it cannot."""
    from infoprune_export.engines.machine import machine_report

    report = machine_report()
    if as_json:
        return print_json(report.as_dict())
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in report.as_rows():
        table.add_row(*map(escape, row))
    show(table)


def _job(model: str, given: dict[str, Any], *, suffix: str = "", **extra: Any) -> tuple[Any, Any, Any]:
    """Recipe with overrides, options and progress of a verb that takes a MODEL."""
    from infoprune_export.material import Options
    from infoprune_export.resolution import resolve

    progress = _progress(given)
    recipe = resolve(model, given, warn=lambda line: say(line, warning=True))
    out = given.get("out") or Path("build") / (recipe.name + suffix)
    options = Options(out=out, seed=given["seed"], threads=given["threads"], device=given["device"], **extra)
    options.random_weights, options.spill = given.get("random_weights", False), given.get("spill")
    options.seconds = given.get("seconds", options.seconds)
    return recipe, options, progress


def _progress(given: dict[str, Any]) -> Any:
    from infoprune_export.progress import Events, Silent, Terminal

    if given.get("quiet"):
        return Silent()
    return Events() if click.get_current_context().params.get("as_json") else Terminal()
