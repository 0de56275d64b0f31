"""A plan applied on its own: to a model's PyTorch weights, or to a bundle's original graphs without PyTorch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infoprune_export.bundle import Bundle
from infoprune_export.errors import InputError
from infoprune_export.job import Job, copy_processor_files, read_plan_for
from infoprune_export.material import Options
from infoprune_export.plans import read_factors
from infoprune_export.progress import Progress
from infoprune_export.recipe import Recipe
from infoprune_export.requirements import require_export, require_graphs
from infoprune_export.workspace import side_folder


def to_model(recipe: Recipe, options: Options, progress: Progress | None = None) -> None:
    """Writes the smaller network as PyTorch weights, for `infoprune_export.load`.

    Args:
        recipe: Of the original; its calibration data serve where the plan has no factors.
        options: With the plan and the output directory.
        progress: Told about steps.

    Raises:
        InputError: the plan is another model's, or the output directory is in use.
        NotEnough: less memory or disk than it takes.
    """
    require_export()
    with Job(recipe, options, progress) as job, _in_place_when_whole(options.out) as part:
        job.resumable = True
        job.foresee(network=True)
        plan = job.factors(job.decide())
        plan.save(part)
        copy_processor_files(job.checkpoint.directory, part)
        job.write_network(plan, part)


def to_graphs(plan_file: Path, bundle_dir: Path, out: Path) -> None:
    """Rewrites the original's graphs of a bundle by a plan and its factors, through onnx-graphsurgeon.

    Args:
        plan_file: plan.json, its factors.safetensors beside it.
        bundle_dir: A bundle that holds its original.
        out: Gets `onnx/`, with quantised graphs where the bundle has such, the plan and the factors.

    Raises:
        InputError: no original in the bundle, no factors, another model's plan, or the output directory is in use.
        MissingRequirement: onnx-graphsurgeon is not installed.
    """
    require_graphs()
    from infoprune_export.engines.build import add_quantised
    from infoprune_export.graph.rewrite import rewrite_graphs

    with _in_place_when_whole(out) as part:
        bundle = Bundle.open(bundle_dir)
        if not bundle.has_original:
            raise InputError(
                "does not hold the original's graphs", where=bundle_dir, mend="make it with --original, or apply the plan to the model"
            )
        plan = read_plan_for(plan_file, bundle.manifest.source.sha256)
        if plan.factors_sha256 is None:
            raise InputError("has no factors", where=plan_file, mend="apply it to the model, which makes them from calibration data")
        factors_file = plan_file.with_name("factors.safetensors")
        factors = read_factors(factors_file, plan.factors_sha256)
        for dtype in bundle.manifest.dtypes:
            rewrite_graphs(bundle.root(original=True) / "onnx", plan, factors, part / "onnx", dtype)
        if bundle.manifest.weights:
            add_quantised(part / "onnx", bundle.manifest.dtypes, bundle.manifest.weights.type)
        shutil.copyfile(plan_file, part / "plan.json")
        shutil.copyfile(factors_file, part / factors_file.name)


@contextmanager
def _in_place_when_whole(out: Path) -> Iterator[Path]:
    """A folder beside an output that takes its place at the end, or goes if anything fails.

    Raises:
        InputError: the output directory is in use, or cannot be written.
    """
    out = out.resolve()  # a link stays one, and what it points to gets the contents
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("exists and is not empty", where=out, mend="choose another --out")
    with side_folder(out, "part", resume=False) as part:
        try:
            yield part
            if out.exists():
                out.rmdir()
            part.rename(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
