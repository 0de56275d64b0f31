"""The main job, stage by stage. Read this first.

    source -> statistics -> plan + factors -> smaller model -> reference -> graphs -> engines -> validation -> bundle

Each stage writes into the work folder and is skipped by a later run of the same command that finds it done.
Only this module knows the order; the wings below it do not know one another.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoprune_export import __version__
from infoprune_export.bundle import Bundle, Flops, Manifest, write_atomically
from infoprune_export.errors import InputError, MissingRequirement
from infoprune_export.models.flops import DENOMINATORS
from infoprune_export.plan import Plan
from infoprune_export.progress import Progress, Silent
from infoprune_export.recipe import DataSource, Dtype, Recipe, Workload
from infoprune_export.workspace import Workspace, check_disk, check_output

if TYPE_CHECKING:
    from torch import nn

    from infoprune_export.compress.statistics import Batch, Statistics
    from infoprune_export.models.anatomy import Anatomy
    from infoprune_export.models.load import SourceModel

ORIGINAL_LIMIT = 2 * 2**30
"""Originals up to this size stay in the bundle unless the user decides otherwise."""
REFERENCE_PROMPTS = 128
REFERENCE_IMAGES = 32


@dataclass
class Options:
    """What a run takes beside the recipe.

    Attributes:
        out: The bundle's directory.
        plan: A plan to apply instead of deciding one.
        original: Keep the original's graphs in the bundle; decided by size when None.
        resume: Go on after the last finished stage of an earlier run.
        seed: For sampling questions and labels.
        threads: Of PyTorch and ONNX Runtime; all when None.
        device: Where PyTorch works; the best present when None.
        archs: GPU architectures for TensorRT engines; the default set when empty.
        validate: Whether to measure.
    """

    out: Path
    plan: Path | None = None
    original: bool | None = None
    resume: bool = True
    seed: int = 0
    threads: int | None = None
    device: str | None = None
    archs: list[str] = field(default_factory=list)


def require_export() -> None:
    """Refuses early, with the install line, where PyTorch and its friends are missing.

    Raises:
        MissingRequirement: names the first package that is missing.
    """
    from importlib.util import find_spec

    for package in ("torch", "transformers", "onnxscript", "onnx_graphsurgeon", "scipy", "psutil"):
        if find_spec(package) is None:
            raise MissingRequirement(f"compressing and exporting need {package}", mend='pip install "infoprune-export[export]"')


class Job:
    """A recipe with its source model, and everything that is made of them, each once and when first needed."""

    def __init__(self, recipe: Recipe, options: Options, progress: Progress | None = None):
        from infoprune_export.models.load import locate

        self.recipe, self.options, self.progress = recipe, options, progress or Silent()
        self.base = recipe.origin.parent if recipe.origin else Path()
        self.checkpoint: SourceModel = locate(recipe.model, self.base, recipe.revision)

    @cached_property
    def original(self) -> nn.Module:
        import torch

        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        with self.progress.step("loading the model"):
            return self.checkpoint.load_model()

    @cached_property
    def anatomy(self) -> Anatomy:
        from infoprune_export.models.families import find_anatomy

        return find_anatomy(self.original)

    @cached_property
    def workload(self) -> Workload:
        """The recipe's, with the model's own number of image tokens."""
        own, asked = self.anatomy.geometry.image_tokens, self.recipe.workload
        if "image_tokens" in asked.model_fields_set and asked.image_tokens != own:
            raise InputError(
                f"workload.image_tokens is {asked.image_tokens}, one image of this model takes {own}",
                where=self.recipe.origin or self.recipe.name,
            )
        return asked.model_copy(update={"image_tokens": own})

    @cached_property
    def batches(self) -> list[Batch]:
        """Calibration data, ready for the model."""
        from infoprune_export.compress.calibration import make_batches

        return make_batches([self._sample(q) for q in self.questions(self.recipe.calibration, self.recipe.samples)])

    def questions(self, sources: list[DataSource], samples: int | None) -> list[Any]:
        """Questions drawn evenly from several data sets."""
        from infoprune_export.data.vqa import load_questions

        share = None if samples is None else -(-samples // len(sources))
        drawn = []
        for s in sources:
            wanted = min(x for x in (share, s.samples, 10**9) if x is not None)
            drawn += load_questions(resolve_data(s.path, self.base), s.split, wanted, self.options.seed).questions
        return drawn if samples is None else drawn[:samples]

    @cached_property
    def prompts(self) -> Any:
        from infoprune_export.runtime.prompts import Prompts

        return Prompts.from_directory(self.checkpoint.directory, self.recipe.prompt)

    @cached_property
    def images(self) -> Any:
        from infoprune_export.runtime.images import ImageProcessor

        return ImageProcessor.from_directory(self.checkpoint.directory)

    def prompt_ids(self, question: str) -> Any:
        return self.prompts.encode(question, images=1, image_tokens=self.anatomy.geometry.image_tokens)

    def _sample(self, question: Any) -> Any:
        import numpy as np

        from infoprune_export.compress.calibration import Sample

        answer = self.prompts.encode_answer(question.answers[0]) if question.answers else np.empty(0, np.int64)
        return Sample(self.prompt_ids(question.question), answer, self.images([question.image.open()]))

    @cached_property
    def statistics(self) -> Statistics:
        from infoprune_export.compress.statistics import gather

        criterion = self.recipe.criterion
        with self.progress.bar("statistics", sum(b.samples for b in self.batches)) as advance:
            return gather(
                self.original,
                self.anatomy,
                self.batches,
                weighted=criterion.weighting == "loss",
                temperature=criterion.temperature,
                seed=self.options.seed,
                progress=advance,
            )

    def decide(self) -> Plan:
        """The plan: the one given, or the one that the criterion and the budget make."""
        from infoprune_export.compress.decide import decide, keep_everything

        recipe, source = self.recipe, self.checkpoint.source
        if self.options.plan:
            return read_plan_for(self.options.plan, source.sha256)
        common = {
            "source": source,
            "criterion": recipe.criterion,
            "workload": self.workload,
            "scope": recipe.scope,
            "seed": self.options.seed,
        }
        if recipe.flops == 1:
            return keep_everything(self.anatomy, **common)
        return decide(self.original, self.anatomy, self.statistics, flops=recipe.flops, **common)

    def factors(self, plan: Plan) -> tuple[Plan, dict[str, Any], nn.Module]:
        """The plan with its factors, and the smaller model: the factors beside a given plan, or new ones.

        The original is used up.
        """
        from infoprune_export.compress.factors import make_factors
        from infoprune_export.compress.surgery import apply_plan

        if self.options.plan and plan.factors_sha256:
            factors = read_factors(self.options.plan.with_name("factors.safetensors"), plan.factors_sha256)
            apply_plan(self.original, plan, factors)
        elif plan.is_identity:
            factors = {}
        else:
            statistics = self.statistics
            with self.progress.bar("factors", len(plan.layers)) as advance:
                factors = make_factors(self.original, plan, self.batches, statistics, progress=lambda _: advance(1))
        plan = plan.model_copy(update={"factors_sha256": hashlib.sha256(factor_bytes(factors)).hexdigest()})
        return plan, factors, self.original


def export_bundle(recipe: Recipe, options: Options, progress: Progress | None = None) -> tuple[Bundle, Any]:
    """The main job: a recipe becomes a bundle with a report.

    Args:
        recipe: With every override applied.
        options: Of this run.
        progress: Told about stages and steps.

    Returns:
        The bundle, and its report (see `validate.report.Report`).

    Raises:
        InfoPruneError: see its subclasses; nothing is left behind unless a stage was finished.
    """
    require_export()
    check_output(options.out)
    progress = progress or Silent()
    job = Job(recipe, options, progress)
    keep_original = _keeps_original(job)
    dtypes = dtypes_for(recipe)
    _check_targets(recipe, options)
    weights = sum(p.stat().st_size for p in _weight_files(job))
    check_disk(options.out, weights * (2 + len(dtypes) + 2 * keep_original))
    with Workspace(options.out, _run_key(job, keep_original), options.resume) as space:
        root = space.path
        space.stage("compress", lambda: _compress(job, root))
        space.stage("reference", lambda: _reference(job, root, progress))
        space.stage("graphs", lambda: _graphs(job, root, dtypes, keep_original, progress))
        space.stage("engines", lambda: _engines(recipe, Plan.read(root / "plan.json"), root, options, keep_original, progress))
        bundle = Bundle(root, _manifest(job, root, dtypes))
        report = _validate(job, bundle, options, progress)
        _card(job, bundle, report)
        (space.path / ".stages").exists()
        bundle.write_manifest()
        space.finish()
    return Bundle.open(options.out, verify=False), report


def _compress(job: Job, root: Path) -> None:
    """Plan, factors and the smaller model's weights, with the files a processor is read from."""
    plan, factors, model = job.factors(job.decide())
    shutil.rmtree(root / "model", ignore_errors=True)
    write_atomically(root / "plan.json", plan.to_json() + "\n")
    (root / "factors.safetensors").write_bytes(factor_bytes(factors))
    copy_processor_files(job.checkpoint.directory, root)
    save_weights(model, root / "model" / "model.safetensors")
    job.__dict__.pop("original", None)  # it has become the smaller model: a later stage that needs the original loads it again


def _reference(job: Job, root: Path, progress: Progress) -> None:
    """What the smaller model answers in PyTorch, for every later check of its graphs."""
    from infoprune_export.graph.reference import record_reference
    from infoprune_export.validate.reference import ReferencePrompt

    data = list(job.recipe.evaluation.values()) or job.recipe.calibration
    questions = job.questions(data, REFERENCE_PROMPTS)
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
    from infoprune_export.graph.export import export_graphs

    anatomy = Plan.read(root / "plan.json").anatomy
    for folder in ("onnx", "original"):
        shutil.rmtree(root / folder, ignore_errors=True)
    networks: list[tuple[str, Path, Callable[[], nn.Module]]] = [("compressed", root / "onnx", lambda: load_network(root))]
    if keep_original:
        networks.append(("original", root / "original" / "onnx", job.checkpoint.load_model))
    for name, out, load in networks:
        model = load()
        for dtype in dtypes:
            with progress.step(f"exporting the {name} network ({dtype})"):
                export_graphs(model, anatomy, out, dtype)


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
                build_into(place, target, plan.workload, dtype_of(recipe, target), options.archs)


def _manifest(job: Job, root: Path, dtypes: list[Dtype]) -> Manifest:
    from infoprune_export.graph.count import count_bundle

    plan = Plan.read(root / "plan.json")
    compressed = count_bundle(root / "onnx", plan.workload, dtypes[0])
    original = count_original(plan)
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
        flops=Flops(
            denominator=DENOMINATORS[plan.budget.scope],
            scope=plan.budget.scope,
            requested=plan.budget.requested,
            achieved=after / before,
            original=before,
            compressed=after,
            parts={p: {"original": original[p], "compressed": compressed[p]} for p in original},
        ),
        files={},
    )


def _validate(job: Job, bundle: Bundle, options: Options, progress: Progress) -> Any:
    from infoprune_export.validate.validate import validate_bundle

    return validate_bundle(bundle, base=job.base, threads=options.threads, progress=progress)


def _card(job: Job, bundle: Bundle, report: Any) -> None:
    from infoprune_export.validate.card import model_card

    write_atomically(bundle.path / "README.md", model_card(bundle.manifest, bundle.plan(), report, licence=job.checkpoint.licence))


# What the stages, the verbs and the Python API share.


def load_network(root: Path) -> nn.Module:
    """The compressed PyTorch model of a bundle (or of what `apply` wrote), with the very weights that were saved."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    from infoprune_export.compress.surgery import shape_as_planned

    plan = Plan.read(root / "plan.json")
    config = AutoConfig.from_pretrained(root, local_files_only=True)
    config.dtype = torch.float32
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    shape_as_planned(model, plan)
    state = load_file(root / "model" / "model.safetensors")
    result = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    absent = set(result.missing_keys) - set(model._tied_weights_keys or ())
    if absent or result.unexpected_keys:
        name = sorted([*absent, *result.unexpected_keys])[0]
        raise InputError(f"{name} does not fit the plan", where=root / "model" / "model.safetensors", mend="fetch or make the bundle again")
    model.infoprune_plan = plan
    return model.eval().requires_grad_(False)


def save_weights(model: nn.Module, path: Path) -> None:
    """Every parameter once, as safetensors; tied ones are tied again when loaded."""
    from safetensors.torch import save_file

    tied = set(model._tied_weights_keys or ()) if getattr(model.config, "tie_word_embeddings", False) else set()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items() if k not in tied}, path, metadata={"format": "pt"})


def copy_processor_files(source: Path, out: Path) -> None:
    from infoprune_export.models.load import PROCESSOR_FILES

    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def factor_bytes(factors: dict[str, Any]) -> bytes:
    from safetensors.numpy import save

    return save(factors)


def read_factors(path: Path, sha256: str) -> dict[str, Any]:
    """Factors that belong to a plan.

    Raises:
        InputError: missing, damaged, or of another plan.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        data = path.read_bytes()
        found = hashlib.sha256(data).hexdigest()
        factors = load(data)
    except (OSError, SafetensorError) as e:
        raise InputError(
            f"cannot be read ({e})", where=path, mend="keep it beside plan.json, or set factors_sha256 to null so that new ones are made"
        ) from None
    if found != sha256:
        raise InputError(
            "is not the file this plan was saved with", where=path, mend="set factors_sha256 to null so that new ones are made"
        )
    return factors


def read_plan_for(path: Path, sha256: str) -> Plan:
    """A plan, checked against the model it is to be applied to."""
    if path.is_dir():
        path = path / "plan.json"
    plan = Plan.read(path)
    if plan.source.sha256 != sha256:
        raise InputError(
            f"was made for another model ({plan.source.id}, sha256 {plan.source.sha256[:12]}…; this one is {sha256[:12]}…)",
            where=path,
            mend="apply it to the model it was made for, or plan this one: infoprune-export plan MODEL",
        )
    return plan


def resolve_data(path: str, base: Path) -> str | Path:
    """`tiny:NAME` as it is; anything else relative to the recipe."""
    return path if path.startswith("tiny:") else base / path


def dtype_of(recipe: Recipe, target: str) -> Dtype:
    return recipe.dtype or ("fp16" if target == "trt" else "fp32")


def dtypes_for(recipe: Recipe) -> list[Dtype]:
    """Types of graphs that the targets need, the portable one first."""
    return sorted({dtype_of(recipe, t) for t in recipe.targets}, key=["fp32", "fp16", "bf16"].index)


def count_original(plan: Plan) -> dict[str, int]:
    from infoprune_export.models.flops import count

    return count(plan.anatomy, plan.workload).parts()


def library_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt-rtx-cu12-bindings", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


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
    """Names everything that the result depends on."""
    o = job.options
    plan = hashlib.sha256(o.plan.read_bytes()).hexdigest() if o.plan and o.plan.is_file() else None
    inputs = {
        "source": job.checkpoint.source.sha256,
        "recipe": job.recipe.model_dump(mode="json"),
        "plan": plan,
        "original": keep_original,
        "seed": o.seed,
        "archs": o.archs,
        "versions": {"infoprune-export": __version__, **library_versions()},
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
