"""The Python interface; the command line calls the same things.

import infoprune_export as ip

plan = ip.plan("llava-hf/llava-1.5-7b-hf", flops=0.33, calibration="data/vqav2")
small = ip.apply(model, plan)
bundle = ip.export(small, processor, out="build/llava", targets=["ort", "trt"])
report = ip.validate("build/llava")
model = ip.load("build/llava")
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoprune_export.bundle import Bundle
from infoprune_export.errors import InputError
from infoprune_export.job import Job
from infoprune_export.material import Options
from infoprune_export.plans import Plan
from infoprune_export.precision import Dtype, WeightType
from infoprune_export.progress import Progress
from infoprune_export.recipe import Scope, TargetName
from infoprune_export.requirements import require_export
from infoprune_export.resolution import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from infoprune_export.models.anatomy import Anatomy
    from infoprune_export.models.load import SourceModel
    from infoprune_export.validation.report import Report


def plan(
    model: str | Path,
    *,
    flops: float | None = None,
    latency: float | None = None,
    scope: Scope | None = None,
    calibration: str | Path | None = None,
    samples: int | None = None,
    train_steps: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Decides what to keep of a model and makes the factors that go with it.

    Args:
        model: Recipe name, recipe file, model directory or hub id.
        flops: Fraction of the FLOPs kept, 0 < flops <= 1; the recipe's when None.
        latency: Instead of FLOPs, fraction kept of a request's time on this machine, 0 < latency < 1.
        scope: What the fraction is of, and what may be cut.
        calibration: Directory or file in an official format; the recipe's data when None.
        samples: Calibration questions.
        train_steps: Steps in which the smaller network learns from the original again; the recipe's when None.
        seed: For drawing questions and labels.
        threads: CPU threads.
        device: Where PyTorch runs, such as `cuda:1`; the best present when None.
        progress: Told about the work.

    Returns:
        The plan, with `factors`; `print(plan)` shows it as a table.

    Raises:
        InfoPruneError: see its subclasses.
    """
    require_export()
    given = {
        "flops": flops,
        "latency": latency,
        "scope": scope,
        "calibration": calibration and Path(calibration),
        "samples": samples,
        "train_steps": train_steps,
    }
    return Job(resolve(str(model), given), Options(out=Path(), seed=seed, threads=threads, device=device), progress).make_plan()


def apply(model: PreTrainedModel, plan: Plan, *, inplace: bool = False) -> PreTrainedModel:
    """Makes a model smaller.

    Args:
        model: The one the plan was made for, as loaded by transformers.
        plan: With its factors.
        inplace: Change the model itself instead of a copy.

    Returns:
        The smaller model, in evaluation mode, the plan attached as `infoprune_plan`.

    Raises:
        InputError: the plan does not fit the model, or has no factors.
    """
    from infoprune_export.compress.surgery import apply_plan

    if plan.factors is None and plan.low_rank_sites():
        raise InputError("the plan has no factors", mend="load it with Plan.load(DIR), or make it with infoprune_export.plan")
    small = model if inplace else copy.deepcopy(model)
    apply_plan(small, plan, plan.factors or {})
    small.infoprune_plan = plan
    return small.eval()


def export(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    out: str | Path,
    *,
    targets: Sequence[TargetName] = ("ort",),
    dtype: Dtype | None = None,
    weights: WeightType | None = None,
    archs: Sequence[str] = (),
    threads: int | None = None,
    seconds: float = 5.0,
    progress: Progress | None = None,
) -> Bundle:
    """Exports a model that `apply` made smaller, builds its engines and validates them.

    Without evaluation data and without the original, the report holds numerics and the latency of the compressed network.

    Args:
        model: From `apply` or `load`.
        processor: The original's.
        out: The bundle's directory.
        targets: What to build; `onnx/` is always written.
        dtype: Type of the graphs; fp32 for ort, fp16 for trt when None.
        weights: Also quantise the matrices, to int8 or int4.
        archs: GPU architectures for TensorRT.
        threads: CPU threads.
        seconds: Measuring time of each part's latency.
        progress: Told about the work.

    Returns:
        The bundle.

    Raises:
        InputError: the model has no plan attached, or the directory is in use.
    """
    from infoprune_export.pipeline import run

    require_export()
    with tempfile.TemporaryDirectory() as directory:
        options = Options(out=Path(out), archs=list(archs), threads=threads, seconds=seconds, original=False)
        job = _InMemory(
            model, processor, Path(directory), {"targets": list(targets), "dtype": dtype, "weights": weights}, options, progress
        )
        bundle, _ = run(job)
    return bundle


def validate(
    directory: str | Path,
    *,
    original: str | Path | None = None,
    max_drop: float | None = None,
    min_speedup: float | None = None,
    **options: Any,
) -> Report:
    """Measures a bundle on this machine and writes its report.

    Args:
        directory: The bundle.
        original: A bundle of the original, if this one does not hold it.
        max_drop: Gate: largest loss of accuracy, in points.
        min_speedup: Gate: smallest end-to-end speed-up.
        options: Further arguments of `validation.validate.validate_bundle`.

    Returns:
        The report; `report.passed` says whether its gates passed.

    Raises:
        InputError: not a bundle, one that was changed, or one in a directory that cannot be written.
        InfoPruneError: see `validation.validate.validate_bundle` and `Report.write`.
    """
    from infoprune_export.validation.report import check_writable
    from infoprune_export.validation.validate import validate_bundle

    bundle = Bundle.open(directory)
    check_writable(bundle.path)
    baseline = None if original is None else Bundle.open(original)
    report = validate_bundle(bundle, original=baseline, max_drop=max_drop, min_speedup=min_speedup, **options)
    report.write(bundle.path, bundle.plan())
    return report


def load(directory: str | Path) -> PreTrainedModel:
    """The compressed PyTorch model of a bundle, or of what the verb `apply` wrote.

    Raises:
        InputError: not a bundle, or one that was changed.
    """
    from infoprune_export.bundle import MANIFEST
    from infoprune_export.compress.network import load_network

    require_export()
    path = Path(directory)
    if (path / MANIFEST).is_file():
        Bundle.open(path)
    elif not (path / "plan.json").is_file():
        raise InputError("holds no compressed model", where=path, mend="name a bundle, or a directory that `infoprune-export apply` wrote")
    return load_network(path)


class _InMemory(Job):
    """A job whose compressed model is at hand and whose original is not."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        directory: Path,
        given: dict[str, Any],
        options: Options,
        progress: Progress | None,
    ):
        self.small = model
        self.plan: Plan | None = getattr(model, "infoprune_plan", None)
        if self.plan is None:
            raise InputError("the model has no plan attached", mend="export what infoprune_export.apply or infoprune_export.load returned")
        processor.save_pretrained(directory)
        model.config.save_pretrained(directory)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(directory)
        from safetensors.torch import save_model

        # A compressed network under the name of a checkpoint: nothing reads it as one, since original and factors are not asked for.
        save_model(model, directory / "model.safetensors")
        recipe = resolve(str(directory), {**given, "flops": self.plan.budget.requested, "scope": self.plan.budget.scope})
        super().__init__(recipe.model_copy(update={"name": options.out.name}), options, progress)

    @cached_property
    def checkpoint(self) -> SourceModel:
        import dataclasses

        return dataclasses.replace(super().checkpoint, source=self.plan.source)

    @cached_property
    def anatomy(self) -> Anatomy:
        return self.plan.anatomy

    def decide(self) -> Plan:
        return self.plan

    def factors(self, plan: Plan) -> Plan:
        return plan

    def write_network(self, plan: Plan, root: Path) -> None:
        from infoprune_export.compress.network import save_weights

        save_weights(self.small, root)
