"""A recipe with its source model, and everything that is made of them, each once and when first needed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from infoprune_export.errors import InputError, MissingRequirement
from infoprune_export.plans import Plan, read_factors
from infoprune_export.progress import Progress, Silent
from infoprune_export.recipe import DataSource, Recipe, Workload, near, packaged, read

if TYPE_CHECKING:
    from torch import nn

    from infoprune_export.compress.statistics import Batch, Statistics
    from infoprune_export.models.anatomy import Anatomy
    from infoprune_export.models.load import SourceModel

Key = TypeVar("Key")


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
        archs: GPU architectures for TensorRT engines; the default set when empty.
        seconds: Measuring time of each part's latency.
    """

    out: Path
    plan: Path | None = None
    original: bool | None = None
    resume: bool = True
    seed: int = 0
    threads: int | None = None
    archs: list[str] = field(default_factory=list)
    seconds: float = 5.0


def require_export() -> None:
    """Refuses early, with the install line, where PyTorch and its friends are missing.

    Raises:
        MissingRequirement: names the first package that is missing.
    """
    from importlib.util import find_spec

    for package in ("torch", "transformers", "onnxscript", "onnx_graphsurgeon", "scipy", "psutil"):
        if find_spec(package) is None:
            raise MissingRequirement(f"compressing and exporting need {package}", mend='pip install "infoprune-export[export]"')


def resolve(model: str, given: dict[str, Any], warn: Callable[[str], None] = lambda line: None) -> Recipe:
    """The recipe that a MODEL argument names, with options over its fields.

    Args:
        model: Recipe name, recipe file, model directory or hub id `org/name`.
        given: Fields to override (flops, scope, dtype, samples, max_drop, min_speedup, targets, calibration); None leaves one as it is.
        warn: Gets a line where a default is not what one would choose.

    Raises:
        InputError: nothing of that name; near names are suggested.
    """
    names, path = packaged(), Path(model)
    if model in names:
        recipe = read(names[model])
    elif path.suffix in (".yaml", ".yml"):
        recipe = read(path)
    elif path.is_dir() or (model.count("/") == 1 and not model.startswith((".", "/", "~"))):
        if given.get("calibration") is None and (given.get("flops") or 1) != 1:
            warn("no calibration data named: using the small packaged set; data like your own is better (--calibration)")
        tiny = [DataSource(path=f"tiny:{name}", split="train") for name in ("vqa", "textvqa", "gqa")]
        local = path.is_dir()
        recipe = Recipe(
            name=path.resolve().name if local else model.split("/")[1], model=str(path.resolve()) if local else model, calibration=tiny
        )
    else:
        raise InputError(
            f"no recipe, file or directory {model!r}{near(model, list(names))}",
            mend=f"recipes: {', '.join(names)}; or name a recipe file, a model directory or a hub id org/name",
        )
    fields = ("flops", "scope", "dtype", "samples", "max_drop", "min_speedup")
    changes: dict[str, Any] = {k: given[k] for k in fields if given.get(k) is not None}
    if given.get("targets"):
        changes["targets"] = list(dict.fromkeys(given["targets"]))
    if given.get("calibration"):
        changes["calibration"] = [DataSource(path=str(given["calibration"].absolute()))]
    origin, recipe = recipe.origin, recipe.model_copy(update=changes)
    recipe._origin = origin
    return recipe


class Job:
    """A recipe with its source model, and everything that is made of them, each once and when first needed."""

    def __init__(self, recipe: Recipe, options: Options, progress: Progress | None = None):
        self.recipe, self.options, self.progress = recipe, options, progress or Silent()
        own = recipe.origin is not None and recipe.origin not in packaged().values()
        self.base = recipe.origin.parent if own else Path()  # a packaged recipe means the user's files, not the package's
        if options.threads:
            import torch

            torch.set_num_threads(options.threads)

    @cached_property
    def checkpoint(self) -> SourceModel:
        from infoprune_export.models.load import locate

        return locate(self.recipe.model, self.base, self.recipe.revision)

    @cached_property
    def original(self) -> nn.Module:
        with self.progress.step("loading the model"):
            return self.checkpoint.load_model()

    @cached_property
    def anatomy(self) -> Anatomy:
        from infoprune_export.models.families import find_anatomy

        return find_anatomy(self.original)

    def adopt(self, plan: Plan) -> Plan:
        """Goes on with a plan that was made; the original, used up or not needed any more, is let go."""
        self.__dict__ |= {"anatomy": plan.anatomy, "workload": plan.workload}
        self.__dict__.pop("original", None)
        return plan

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

        if not sources:
            raise InputError("no calibration data", where=self.recipe.origin or self.recipe.name, mend="name some with --calibration PATH")
        share = None if samples is None else -(-samples // len(sources))
        drawn = []
        for s in self.resolved(dict(enumerate(sources))).values():
            limits = [x for x in (share, s.samples) if x is not None]
            drawn += load_questions(s.path, s.split, min(limits, default=None), self.options.seed).questions
        return drawn if samples is None else drawn[:samples]

    def resolved(self, sources: dict[Key, DataSource]) -> dict[Key, DataSource]:
        """Data sources with paths that do not depend on the working directory; `tiny:NAME` stays as it is."""
        return {
            k: s if s.path.startswith("tiny:") else s.model_copy(update={"path": str((self.base / s.path).absolute())})
            for k, s in sources.items()
        }

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

    def factors(self, plan: Plan) -> tuple[Plan, nn.Module]:
        """The plan with its factors (those beside a given plan, or new ones), and the smaller model.

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
        plan = plan.model_copy()
        plan.factors = factors
        return plan, self.original


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


def copy_processor_files(source: Path, out: Path) -> None:
    from infoprune_export.models.load import PROCESSOR_FILES

    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
