"""What a bundle is worth on this machine: the order of the checks, and what is said where one cannot be made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from infoprune_export.bundle import COMPONENTS, Bundle
from infoprune_export.data.vqa import PACKAGED
from infoprune_export.engines.cuda import gpus
from infoprune_export.engines.machine import machine_report
from infoprune_export.errors import InfoPruneError, InputError
from infoprune_export.precision import Precision, float_type, is_quantised
from infoprune_export.recipe import DataSource, Workload
from infoprune_export.runtime.config import ModelConfig
from infoprune_export.runtime.session import EngineName, Session, is_held
from infoprune_export.validation import accuracy, latency, numerics, quantisation, tasks
from infoprune_export.validation.affinity import allowed
from infoprune_export.validation.baseline import Baseline, find_baseline
from infoprune_export.validation.gates import judge
from infoprune_export.validation.generation import dtype_of, limits_of
from infoprune_export.validation.overflow import first_overflow
from infoprune_export.validation.records import PARTS, GenerationNumerics, LatencySettings, NotMeasured, Quantisation, Size
from infoprune_export.validation.reference import Reference, read_reference
from infoprune_export.validation.report import Report

NO_ACCURACY = "the weights are random and have no accuracy"
Notify = Callable[[str], None]
Progress = Callable[[str, int, int], None]
"""Told what is under way, how much of it is done, and of how much."""


def validate_bundle(
    bundle: Bundle,
    *,
    engines: Sequence[EngineName] | None = None,
    evaluation: Mapping[str, DataSource] | None = None,
    workload: Workload | None = None,
    original: Bundle | None = None,
    threads: int | None = None,
    max_drop: float | None = None,
    min_speedup: float | None = None,
    seconds: float = 5.0,
    notify: Notify = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Measures a bundle on this machine, beside the original where that is at hand.

    Args:
        bundle: With its graphs, plan and reference; its hashes are not looked at.
        engines: What to check; the portable graphs and the bundle's targets when None. Accuracy goes through
            the first that runs here, with quantised weights too where the bundle has them, a built one before the portable graphs.
        evaluation: Task name to data; the recipe's when None.
        workload: Shapes to time; the bundle's when None.
        original: The original in a bundle of its own (`--flops 1`), where this bundle does not hold it.
        threads: CPU threads; all cores when None.
        max_drop: Gate: largest loss of accuracy on any task, in points.
        min_speedup: Gate: smallest end-to-end speed-up on any engine.
        seconds: Measuring time of each part's latency, original and compressed together.
        notify: Gets a line for every check made or left out.
        progress: Told of questions answered and parts timed.

    Returns:
        The report with its gates; `Report.write` puts it into a directory.

    Raises:
        InputError: a bundle without a reference, an `original` of another model, a workload that is not the
            model's, an engine asked for by name that the bundle does not hold, or accuracy of random weights.
        MissingRequirement, NotEnough: this machine cannot run an engine asked for by name.
    """
    manifest = bundle.manifest
    if manifest.random_weights and (evaluation or max_drop is not None):
        raise InputError(NO_ACCURACY, where=bundle.path, mend="ask for times and numerics alone, or compress the model's own weights")
    run = Run(bundle, find_baseline(bundle, original), threads, notify, progress)
    inputs = run.inputs(workload or manifest.workload)
    runnable = run.check_numerics(engines)
    preferred = run.preferred(runnable)
    run.measure_accuracy(preferred, manifest.recipe.evaluation if evaluation is None else evaluation)
    run.measure_latency(preferred, inputs, workload or manifest.workload, seconds)
    run.describe_machine()
    run.report.gates = judge(run.report, max_drop, min_speedup)
    return run.report


@dataclass(frozen=True)
class Variant:
    """One way of running a bundle that works here."""

    engine: EngineName
    dtype: Precision

    @property
    def quantised(self) -> bool:
        return is_quantised(self.dtype)


class Run:
    """One validation: the report as it fills, and what every check needs."""

    def __init__(self, bundle: Bundle, baseline: Baseline | None, threads: int | None, notify: Notify, progress: Progress):
        self.bundle, self.baseline, self.threads, self.notify, self.progress = bundle, baseline, threads, notify, progress
        manifest = bundle.manifest
        dtype = manifest.dtypes[0]
        self.report = Report(
            tool=manifest.tool,
            name=manifest.recipe.name,
            source=manifest.source,
            random_weights=manifest.random_weights,
            measured_at=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            workload=manifest.workload,
            flops=manifest.flops,
            latency_budget=bundle.plan().budget.latency,
            training=bundle.plan().training,
            size=Size(
                original_bytes=_graph_bytes(baseline.bundle, dtype, baseline.inside) if baseline else None,
                compressed_bytes=_graph_bytes(bundle, dtype, original=False),
                quantised_bytes=_graph_bytes(bundle, manifest.quantised[0], original=False) if manifest.weights else None,
            ),
            quantisation=Quantisation(weights=manifest.weights.type, block_size=manifest.weights.block_size) if manifest.weights else None,
        )
        if baseline is None:
            mend = "make one with --flops 1 and give it: infoprune-export validate DIR --original DIR0"
            self.skip("original", f"the bundle keeps none; {mend}")

    def skip(self, what: str, reason: str) -> None:
        self.report.not_measured.append(NotMeasured(what=what, reason=reason))
        self.notify(f"SKIPPED | {what} | {reason}")

    def describe_machine(self) -> None:
        self.report.machine = machine_report(self.bundle.path).description()

    @staticmethod
    def preferred(variants: Sequence[Variant]) -> Sequence[Variant]:
        """Built engines where there are any: the portable graphs are what they were built from."""
        return [v for v in variants if v.engine != "onnx"] or variants

    def inputs(self, workload: Workload) -> latency.Inputs:
        config = ModelConfig.from_directory(self.bundle.path)
        return latency.random_inputs(self.bundle.plan().anatomy, workload, config.image_token_id)

    def sessions(self, engines: Sequence[EngineName] | None, needed_for: Sequence[str]) -> Iterator[tuple[Variant, Session]]:
        """Opens every engine in every type of the bundle that runs here, one at a time.

        Engines asked for by name have to run in every precision that there are files of; of the bundle's own (`engines` None) one may
        be left out, with the reason given for everything it was needed for.
        """
        manifest = self.bundle.manifest
        for engine in engines or dict.fromkeys(("onnx", *manifest.targets)):
            absent: dict[Precision, InfoPruneError] = {}
            # A TensorRT engine is found by the GPU it is for; its type is the one that it was built in.
            dtypes: list[Precision] = [*manifest.dtypes[: 1 if engine == "trt" else None], *manifest.quantised]
            for dtype in dtypes:
                try:
                    opened = [Session.open(self.bundle, engine=engine, dtype=dtype, threads=self.threads)]
                except InfoPruneError as e:
                    absent[dtype] = e
                else:
                    variant = Variant(engine, dtype if is_quantised(dtype) else dtype_of(opened[0]))
                    yield variant, opened.pop()  # and is gone once whoever asked for it lets go of it
            broken = {dtype: e for dtype, e in absent.items() if is_held(self.bundle, engine, dtype)}
            first = next(iter(absent.values()), None)
            if engines and (broken or len(absent) == len(dtypes)):
                raise next(iter(broken.values()), first)
            if len(absent) == len(dtypes):
                for what in needed_for:
                    self.skip(f"{what}.{engine}", _why_not(engine, first))
            else:
                for dtype, e in broken.items():
                    self.skip(f"{needed_for[0]}.{engine}.{dtype}", _one_line(e))

    def check_numerics(self, engines: Sequence[EngineName] | None) -> list[Variant]:
        """Holds every engine and type against the reference; says which of them run.

        The first engine's records in the bundle's first type have the components' plain names; others have a
        suffix, as in `vision_encoder_fp16` and `generation_trt_fp16`.
        """
        reference = read_reference(self.bundle.reference)
        references = _references(self, reference)  # now: each takes a session of its own
        runnable: list[Variant] = []
        plain: Variant | None = None
        for variant, session in self.sessions(engines, ("numerics", "latency")):
            engine, dtype = variant.engine, variant.dtype
            plain = plain or variant
            suffix = ("" if engine == plain.engine else f"_{engine}") + ("" if dtype == plain.dtype else f"_{dtype}")
            limits = limits_of(engine, self.bundle.manifest.workload)
            held = references[dtype] if variant.quantised else reference
            if isinstance(held, InputError):  # bfloat16, for which the CPU has no kernels
                self.skip(f"numerics.{engine}.{dtype}", f"its portable graph does not run here: {_one_line(held)}")
                runnable.append(variant)
                del session
                continue
            try:
                records = numerics.check(session, held, engine=engine, dtype=dtype, limits=limits, notify=self.notify)
                runnable.append(variant)
            except InfoPruneError as e:  # an engine that opens and then does not run has failed, not been left out
                failed = GenerationNumerics(engine=engine, dtype=dtype, prompts=0, identical_token_ids=0, passed=False, message=str(e))
                records = {"generation": failed}
                self.notify(numerics.describe("generation", failed))
            finally:
                del session  # or it were in memory beside the next
            if (engine, dtype) == ("onnx", "fp16") and (overflow := first_overflow(self.bundle, reference)):
                record = records.setdefault(overflow.component, numerics.unmeasured(engine, dtype))
                record.passed, record.message = False, "; ".join(filter(None, (record.message, str(overflow))))
                self.notify(f"FAILED | {overflow.component} (onnx, fp16) | {overflow}")
            self.report.numerics |= {f"{name}{suffix}": record for name, record in records.items()}
        return runnable

    @staticmethod
    def with_quantised_weights(variant: Variant, variants: Sequence[Variant]) -> Variant | None:
        """The variant with quantised weights on the same engine and in the same type, if it runs here."""
        return next((v for v in variants if v.quantised and (v.engine, float_type(v.dtype)) == (variant.engine, variant.dtype)), None)

    def skip_quantised(self, what: str, variant: Variant) -> None:
        """Says that a figure of quantised weights is missing, where the bundle has such weights."""
        if weights := self.bundle.manifest.weights:
            build = "" if variant.engine == "onnx" else f"; build it: infoprune-export build DIR --target {variant.engine}"
            self.skip(f"{what}.quantised", f"no {weights.type} network for {variant.engine} in {variant.dtype} runs here{build}")

    def measure_accuracy(self, variants: Sequence[Variant], evaluation: Mapping[str, DataSource]) -> None:
        """Accuracy of every network on every task whose data is at hand, through the first variant that has all of them."""
        if self.report.random_weights:
            self.skip("accuracy", NO_ACCURACY)
            return
        if not evaluation:
            self.skip("accuracy", "no evaluation data was given; name some under `evaluation` in the recipe")
            return
        if not variants:
            self.skip("accuracy", "no engine of this bundle runs here")
            return
        floating = [v for v in variants if not v.quantised] or variants
        variant = next((v for v in floating if self.with_quantised_weights(v, variants)), floating[0])
        limits = limits_of(variant.engine, self.bundle.manifest.workload)
        examiner = tasks.Examiner(self.bundle.path, self.bundle.manifest.recipe.prompt, limits, self.progress)
        exams = {}
        for task, source in evaluation.items():
            try:
                exams[task] = examiner.prepare(source)
            except InputError as e:
                self.skip(f"accuracy.{task}", _one_line(e) + _looked_for(source))
        if not exams:
            return
        # One network after the other, so that only one is in memory.
        compressed = self._sit(examiner, exams, partial(self._compressed, variant), "compressed", "accuracy")
        if not compressed:
            return
        original = self._sit(examiner, exams, partial(self._original, variant, "accuracy"), "original", "accuracy of the original")
        quantised: dict[str, list[float]] = {}
        if small := self.with_quantised_weights(variant, variants):
            quantised = self._sit(examiner, exams, partial(self._compressed, small), small.dtype, "accuracy.quantised")
        else:
            self.skip_quantised("accuracy", variant)
        for task, exam in exams.items():
            made = exam.record(original.get(task), compressed[task], quantised.get(task), variant.engine, variant.dtype)
            self.report.accuracy[task] = made
            self.notify(f"MEASURED | accuracy.{task} ({variant.engine}, {variant.dtype}) | {accuracy.describe(made)}")

    def _sit(
        self, examiner: tasks.Examiner, exams: Mapping[str, tasks.Exam], opens: Callable[[], Session | None], network: str, what: str
    ) -> dict[str, list[float]]:
        """Scores of one network on every task; none where it is not at hand, or where it fails, with the reason under the name `what`."""
        try:
            session = opens()
            return examiner.sit_all(exams, session, network) if session else {}
        except InfoPruneError as e:
            self.skip(what, _one_line(e))
            return {}

    def measure_latency(self, variants: Sequence[Variant], inputs: latency.Inputs, workload: Workload, seconds: float) -> None:
        """Times every engine in the first of its types that runs, all networks in turn."""
        if not variants:
            self.skip("latency", "no engine of this bundle runs here")
        manifest = self.bundle.manifest
        counted = workload == manifest.workload
        kept = latency.kept_by_part(manifest.flops.parts if counted else latency.flop_parts(self.bundle.plan(), workload))
        for variant in {v.engine: v for v in reversed(variants)}.values():
            engine, small = variant.engine, self.with_quantised_weights(variant, variants)
            if small is None:
                self.skip_quantised(f"latency.{engine}", variant)
            original = self._original(variant, f"latency.{engine}")
            load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
            try:
                compressed = self._compressed(variant)
                parts = latency.measure(
                    compressed,
                    original,
                    inputs,
                    workload.new_tokens,
                    quantised=self._compressed(small) if small else None,
                    seconds=seconds,
                    flops_kept=kept,
                    progress=partial(self.progress, f"timing {engine}"),
                )
            except InfoPruneError as e:
                self.skip(f"latency.{engine}", _one_line(e))
                continue
            self.report.latency[engine] = parts
            self.report.latency_settings[engine] = LatencySettings(
                dtype=variant.dtype,
                devices={component: opened.device for component, opened in compressed.engines.items()},
                threads=self.threads,
                workload=workload,
                seconds_per_part=seconds,
                warmup_rounds=latency.WARMUP_ROUNDS,
                cpus=allowed(),
                load_average=load,
            )
            for part in PARTS:
                if part in parts:
                    self.notify(f"MEASURED | latency.{engine}.{part} | {latency.describe(parts[part])}")
                else:
                    self.skip(f"latency.{engine}.{part}", f"the workload has none ({workload})")

    def _compressed(self, variant: Variant) -> Session:
        return Session.open(self.bundle, engine=variant.engine, dtype=variant.dtype, threads=self.threads)

    def _original(self, variant: Variant, what: str) -> Session | None:
        """The original on the same engine and type, or the reason why not under the name of what needs it."""
        if self.baseline is None:
            return None
        try:
            return self.baseline.open(variant.engine, variant.dtype, self.threads)
        except InfoPruneError as e:
            self.skip(f"{what} of the original", _one_line(e))
            return None


def _references(run: Run, floating: Reference) -> dict[Precision, Reference | InputError]:
    """What engines with quantised weights are held against, or why it cannot be made; the distance of each is noted."""
    found: dict[Precision, Reference | InputError] = {}
    for precision in run.bundle.manifest.quantised:
        try:
            made = quantisation.float_answers(run.bundle, precision, floating, run.threads)
        except InputError as e:
            found[precision] = e
            continue
        found[precision], told = made, run.report.quantisation
        distance, alike = quantisation.distance(made, floating)
        told.distance |= {f"{component}_{precision}": x for component, x in distance.items()}
        told.prompts, told.identical_token_ids[precision] = len(made.prompts), alike
        for component, x in distance.items():
            run.notify(quantisation.describe(f"{component}_{precision}", x))
    return found


def _graph_bytes(bundle: Bundle, dtype: Precision, original: bool) -> int:
    graphs = [bundle.graph(component, dtype, original) for component in COMPONENTS]
    files = [file for graph in graphs for file in (graph, graph.with_name(graph.name + "_data"))]
    return sum(file.stat().st_size for file in files if file.is_file())


def _looked_for(source: DataSource) -> str:
    """Where data were looked for that are not there: a recipe's paths are relative, and its place is not the bundle's."""
    if source.path.startswith(PACKAGED) or Path(source.path).is_absolute() or Path(source.path).exists():
        return ""
    return f"; looked for in the working directory, {Path.cwd()}"


def _why_not(engine: EngineName, error: InfoPruneError) -> str:
    if engine == "trt" and not gpus():
        return "no NVIDIA GPU here; run `infoprune-export validate DIR` on the target"
    return _one_line(error)


def _one_line(error: InfoPruneError) -> str:
    return "; ".join(str(error).splitlines())
