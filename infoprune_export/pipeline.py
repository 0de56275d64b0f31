"""The main job, stage by stage. Read this first.

    source -> statistics -> plan + factors -> smaller model -> training -> graphs -> reference -> quantised graphs -> engines
           -> validation -> bundle

Each stage writes into the work folder and is skipped by a later run of the same command that finds it done.
Only this module knows the order; the wings below it do not know one another.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from infoprune_export import __version__
from infoprune_export.bundle import Bundle, Flops, Manifest
from infoprune_export.errors import InputError
from infoprune_export.files import write_whole
from infoprune_export.job import Job, copy_processor_files
from infoprune_export.launched import announce, is_first, processes, wait
from infoprune_export.ledger import Ledger
from infoprune_export.material import Options
from infoprune_export.models.flops import DENOMINATORS, count
from infoprune_export.plans import Plan
from infoprune_export.precision import Dtype, quantised
from infoprune_export.progress import Progress
from infoprune_export.recipe import DataSource, Recipe
from infoprune_export.requirements import require_export
from infoprune_export.versions import library_versions
from infoprune_export.workspace import Workspace, check_output

if TYPE_CHECKING:
    from torch import nn

    from infoprune_export.validation.records import Resources
    from infoprune_export.validation.report import Report

ORIGINAL_LIMIT = 2 * 2**30
"""Originals up to this size stay in the bundle unless the user decides otherwise."""
TRAINING_ADVISED = 0.5
"""Budgets below this one lose accuracy that only training wins back."""
REFERENCE_PROMPTS, LEAST_REFERENCE_PROMPTS = 128, 2
REFERENCE_FLOPS = 2 * 10**13
"""Of all reference prompts together, some minutes on two cores; a large network answers fewer."""
REFERENCE_IMAGES = 32


def export_bundle(recipe: Recipe, options: Options, progress: Progress | None = None) -> tuple[Bundle, Report]:
    """The main job: a recipe becomes a bundle with a report.

    Args:
        recipe: With every override applied.
        options: Of this run.
        progress: Told about stages and steps.

    Returns:
        The bundle, and its report (see `validation.report.Report`).

    Raises:
        InfoPruneError: see its subclasses; nothing is left behind unless a stage was finished.
    """
    require_export()
    check_output(options.out)
    with Job(recipe, options, progress) as job:
        if recipe.kept < TRAINING_ADVISED and not recipe.train_steps and not options.plan and not options.random_weights:
            job.progress.note(f"keeping {recipe.budget} without training costs accuracy; --train-steps 400 can win much of it back")
        return run(job)


def run(job: Job) -> tuple[Bundle, Report]:
    """Runs every stage of a job; see `export_bundle`."""
    recipe, options, progress = job.recipe, job.options, job.progress
    job.resumable = True
    _check_targets(recipe, options)  # first: the weights may yet have to be fetched or made
    keep_original = _keeps_original(job)
    dtypes = dtypes_for(recipe)
    job.check_training()
    if recipe.evaluation:
        job.questions(list(recipe.evaluation.values()), 1)  # a misspelt path is told now and not after the work
    space = Workspace(options.out, _run_key(job, keep_original), options.resume, [options.spill] if options.spill else [])
    work = job.work(dtypes=dtypes, original=keep_original)
    ledger = Ledger(work, space, job.spill_folder if options.spill else None, progress.note)
    with space, ledger.kept():
        root = space.path
        job.scratch = space.scratch
        if recipe.train_steps:
            ledger.stage("compress", lambda: _compress(job, space.scratch))
            job.clear_spill()
            ledger.stage("train", lambda: _train(job, space.scratch, root))
            announce(space.scratch, "done")
        else:
            ledger.stage("compress", lambda: _compress(job, root))
            job.clear_spill()
        plan = job.adopt(Plan.read(root / "plan.json"))
        ledger.stage("graphs", lambda: _graphs(job, root, dtypes, keep_original, progress))
        resources = ledger.close(job.stopwatch.seconds)
        space.stage("reference", lambda: _reference(job, root, progress))
        if recipe.weights:
            space.stage("weights", lambda: _quantise(recipe, root, dtypes, progress))
        space.stage("engines", lambda: _engines(recipe, plan, root, options, keep_original, progress))
        bundle = Bundle(root, _manifest(job, root, dtypes))
        report = _validate(job, bundle, resources)
        bundle.write_manifest()
        space.finish()
    return Bundle.open(options.out, verify=False), report


def _compress(job: Job, root: Path) -> None:
    """Plan, factors and the smaller model's weights, with the files a processor is read from."""
    plan = job.factors(job.decide())
    plan.save(root)
    copy_processor_files(job.checkpoint.directory, root)
    job.write_network(plan, root)


def _train(job: Job, untrained: Path, root: Path) -> None:
    """Trains the smaller model; what it learns goes into the factors."""
    from infoprune_export.compress.network import save_weights

    with job.stopwatch.measuring("training"):
        model = _untrained(job, untrained)
        announce(untrained, "train")
        plan = job.recover(Plan.load(untrained), model)
    plan.save(root)
    copy_processor_files(job.checkpoint.directory, root)
    save_weights(model, root)


def _untrained(job: Job, directory: Path) -> nn.Module:
    from infoprune_export.compress.network import load_network

    return load_network(directory).to(job.device)


def assist(recipe: Recipe, options: Options) -> None:
    """What the further processes of an `accelerate launch` do: wait for the first one, and train with it."""
    require_export()
    job = Job(recipe, options)
    if recipe.train_steps:
        job.scratch = Workspace(options.out, _run_key(job, _keeps_original(job))).scratch
        if wait(job.scratch) == "train":
            job.recover(Plan.load(job.scratch), _untrained(job, job.scratch))


def _reference(job: Job, root: Path, progress: Progress) -> None:
    """What the smaller model answers in PyTorch, for every later check of its graphs."""
    from infoprune_export.compress.network import load_network
    from infoprune_export.graph.reference import record_reference
    from infoprune_export.validation.reference import ReferencePrompt

    data = list(job.recipe.evaluation.values()) or job.recipe.calibration or [DataSource(path="tiny:vqa")]
    affordable = REFERENCE_FLOPS // count(job.anatomy, job.workload, Plan.read(root / "plan.json")).over("all")
    prompts = min(REFERENCE_PROMPTS, max(LEAST_REFERENCE_PROMPTS, affordable))
    questions = job.questions([s.model_copy(update={"samples": None}) for s in data], prompts)
    distinct = list(dict.fromkeys(q.image for q in questions))[:REFERENCE_IMAGES]
    row = {image: i for i, image in enumerate(distinct)}
    # Questions about an image past the limit are asked about another one: any image will do to compare two runtimes.
    prompts = [ReferencePrompt(job.prompt_ids(q.question), row.get(q.image, i % len(distinct))) for i, q in enumerate(questions)]
    with progress.step("reference answers in PyTorch"):
        record_reference(
            load_network(root),
            prompts,
            job.images([image.open() for image in distinct]),
            root / "reference.safetensors",
            max_new_tokens=max(job.workload.new_tokens, 8),
            eos_token_ids=job.prompts.eos_ids,
        )


def _graphs(job: Job, root: Path, dtypes: list[Dtype], keep_original: bool, progress: Progress) -> None:
    """The graphs of both networks: the original is traced and the plan applied to its graphs, or the smaller one is traced itself.

    Both routes give the same network; the first costs one trace instead of two.
    """
    from infoprune_export.compress.network import open_network
    from infoprune_export.graph.export import export_graphs
    from infoprune_export.graph.rewrite import rewrite_graphs

    plan = Plan.load(root)
    for folder in ("onnx", "original"):
        shutil.rmtree(root / folder, ignore_errors=True)
    types = ", ".join(dtypes)
    if not keep_original:
        with progress.step(f"exporting the compressed network ({types})"):
            export_graphs(open_network(root), plan.anatomy, root / "onnx", *dtypes)
        return
    job.checkpoint.check_unchanged()
    with progress.step(f"exporting the original network ({types})"):
        export_graphs(job.checkpoint.open_model(), plan.anatomy, root / "original" / "onnx", *dtypes)
    for dtype in dtypes:
        with progress.step(f"applying the plan to its graphs ({dtype})"):
            rewrite_graphs(root / "original" / "onnx", plan, plan.factors or {}, root / "onnx", dtype)


def _quantise(recipe: Recipe, root: Path, dtypes: list[Dtype], progress: Progress) -> None:
    """The smaller network once more, its matrices quantised; the original stays as it is."""
    from infoprune_export.engines.build import add_quantised

    add_quantised(root / "onnx", dtypes, recipe.weights, progress)


def _engines(recipe: Recipe, plan: Plan, root: Path, options: Options, keep_original: bool, progress: Progress) -> None:
    from infoprune_export.engines.build import build_into

    roots = [root, *([root / "original"] if keep_original else [])]
    for target in recipe.targets:
        if target == "onnx":
            continue
        for place in roots:
            name = "compressed" if place == root else "original"
            with progress.step(f"building the {name} network for {target}"):
                shutil.rmtree(place / "engines" / target, ignore_errors=True)
                dtype = dtype_of(recipe, target)
                build_into(place, target, plan.workload, dtype, options.archs)
                if recipe.weights and place == root:
                    build_into(place, target, plan.workload, quantised(dtype, recipe.weights), options.archs)


def _manifest(job: Job, root: Path, dtypes: list[Dtype]) -> Manifest:
    from infoprune_export.engines.quantise import describe
    from infoprune_export.graph.count import count_bundle

    plan = Plan.read(root / "plan.json")
    compressed = count_bundle(root / "onnx", plan.workload, dtypes[0])
    original = count(plan.anatomy, plan.workload).parts()
    within = {"all": ("vision", "projector", "prefill", "decode"), "vision": ("vision",), "language": ("prefill", "decode")}[
        plan.budget.scope
    ]
    before, after = (sum(c[p] for p in within) for c in (original, compressed))
    return Manifest(
        tool=f"infoprune-export {__version__}",
        libraries=library_versions(),
        source=plan.source,
        recipe=job.recipe,
        workload=plan.workload,
        dtypes=dtypes,
        targets=job.recipe.targets,
        weights=describe(root / "onnx", dtypes[0], job.recipe.weights) if job.recipe.weights else None,
        flops=Flops(
            denominator=DENOMINATORS[plan.budget.scope],
            scope=plan.budget.scope,
            requested=plan.budget.requested,
            achieved=after / before,
            original=before,
            compressed=after,
            parts={p: {"original": original[p], "compressed": compressed[p]} for p in original},
        ),
        random_weights=job.options.random_weights,
        files={},
    )


def write_plan(recipe: Recipe, options: Options, progress: Progress | None = None) -> Plan:
    """Decides a plan, makes its factors and writes both into `options.out`."""
    require_export()
    if recipe.latency is not None and processes() > 1:  # each would measure, and decide, for itself
        raise InputError("--latency is decided by one process", mend="plan without a launcher, or export, which decides in the first")
    out = options.out
    own = {"plan.json", "factors.safetensors", "factors.safetensors.part"}
    if out.exists() and (not out.is_dir() or {p.name for p in out.iterdir()} - own):
        raise InputError("exists and holds something else than a plan; it is never overwritten", where=out, mend="choose another --out")
    with Job(recipe, options, progress) as job:
        job.resumable = True
        job.foresee(network=False)
        plan = job.make_plan()
        if is_first():  # the processes of a launch all come to the same plan
            plan.save(out)
    return plan


def _validate(job: Job, bundle: Bundle, resources: Resources) -> Report:
    """Measures the bundle before it is put in place; the card quotes its figures, so it is hashed after this."""
    from infoprune_export.validation.card import model_card
    from infoprune_export.validation.validate import validate_bundle

    recipe, plan = job.recipe, bundle.plan()
    report = validate_bundle(
        bundle,
        evaluation=job.resolved(recipe.evaluation),
        threads=job.options.threads,
        max_drop=recipe.max_drop,
        min_speedup=recipe.min_speedup,
        seconds=job.options.seconds,
        notify=job.progress.note,
        progress=job.progress.counter(),
    )
    report.resources = resources
    report.write(bundle.path, plan)
    write_whole(bundle.path / "README.md", model_card(bundle.manifest, plan, report, licence=job.checkpoint.licence))
    return report


def dtype_of(recipe: Recipe, target: str) -> Dtype:
    return recipe.dtype or ("fp16" if target == "trt" else "fp32")


def dtypes_for(recipe: Recipe) -> list[Dtype]:
    """Types of graphs that the targets need, the portable one first."""
    return sorted({dtype_of(recipe, t) for t in recipe.targets}, key=["fp32", "fp16", "bf16"].index)


def _weight_files(job: Job) -> list[Path]:
    from infoprune_export.models.load import weight_files

    return weight_files(job.checkpoint.directory)


def _keeps_original(job: Job) -> bool:
    if job.options.original is not None:
        return job.options.original
    return sum(p.stat().st_size for p in _weight_files(job)) < ORIGINAL_LIMIT


def _check_targets(recipe: Recipe, options: Options) -> None:
    """Refuses targets that this machine cannot build, before any work."""
    from infoprune_export.engines.build import check_target

    for target in recipe.targets:
        if target != "onnx":
            check_target(target, options.archs)


def _run_key(job: Job, keep_original: bool) -> str:
    """Names everything that the bundle depends on."""
    return job.key(original=keep_original, archs=job.options.archs)
