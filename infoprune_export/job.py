"""A recipe with its source model, and everything that is made of them, each once and when first needed."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from infoprune_export.errors import InputError, MissingRequirement
from infoprune_export.launched import processes
from infoprune_export.memory import give_back_large_blocks
from infoprune_export.plans import Plan, Source, read_factors
from infoprune_export.progress import Progress, Silent
from infoprune_export.recipe import DataSource, Recipe, Workload, near, packaged, read
from infoprune_export.stopwatch import Stopwatch

if TYPE_CHECKING:
    import torch
    from torch import nn

    from infoprune_export.compress.findings import Findings, Survey
    from infoprune_export.compress.packing import Row
    from infoprune_export.compress.statistics import Batch
    from infoprune_export.models.anatomy import Anatomy
    from infoprune_export.models.load import SourceModel
    from infoprune_export.timetable import TimeTable
    from infoprune_export.validation.stand_ins import Setting

Key = TypeVar("Key")
SYNTHETIC_ANSWER = 4
"""Tokens of a synthetic answer at most: those of a benchmark are a word or two."""


@dataclass
class Options:
    """What a run takes beside the recipe.

    Attributes:
        out: The bundle's directory.
        plan: File of a plan to apply instead of deciding one, its factors beside it.
        original: Keep the original's graphs in the bundle; decided by size when None.
        resume: Go on after the last finished stage of an earlier run.
        seed: For sampling questions and labels.
        threads: Of PyTorch and ONNX Runtime; all when None.
        archs: GPU architectures for TensorRT engines; the default set when empty.
        seconds: Measuring time of each part's latency.
        device: Where statistics, factors and training run; the best present when None.
        spill: Directory for hidden states and what is kept of pass 1; beside `out` when None.
        random_weights: Make the weights, in a folder beside `out`, and the data; take only the shapes from the recipe's model.
    """

    out: Path
    plan: Path | None = None
    original: bool | None = None
    resume: bool = True
    seed: int = 0
    threads: int | None = None
    archs: list[str] = field(default_factory=list)
    seconds: float = 5.0
    device: str | None = None
    random_weights: bool = False
    spill: Path | None = None


def require_export() -> None:
    """Refuses early, with the install line, where PyTorch and its friends are missing.

    Raises:
        MissingRequirement: names the first package that is missing.
    """
    from importlib.util import find_spec

    for package in ("torch", "transformers", "onnxscript", "onnx_graphsurgeon", "scipy"):
        if find_spec(package) is None:
            raise MissingRequirement(f"compressing and exporting need {package}", mend='pip install "infoprune-export[export]"')


def resolve(model: str, given: dict[str, Any], warn: Callable[[str], None] = lambda line: None) -> Recipe:
    """The recipe that a MODEL argument names, with options over its fields.

    Args:
        model: Recipe name, recipe file, model directory or hub id `org/name`.
        given: Fields to override, such as flops, targets or calibration (a path); None leaves one as it is.
        warn: Gets a line where a default is not what one would choose.

    Raises:
        InputError: nothing of that name (near names are suggested), or two budgets.
    """
    random = given.get("random_weights", False)
    if random:
        _check_random(given)
    if given.get("flops") is not None and given.get("latency") is not None:
        raise InputError("--flops and --latency are two budgets", mend="give one: --latency allocates by times measured on this machine")
    names, path = packaged(), Path(model)
    if model in names:
        recipe = read(names[model])
    elif path.suffix in (".yaml", ".yml"):
        recipe = read(path)
    elif path.is_dir() or (model.count("/") == 1 and not model.startswith((".", "/", "~"))):
        if not random and given.get("calibration") is None and (given.get("latency") or given.get("flops") or 1) != 1:
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
    fields = ("flops", "latency", "scope", "dtype", "weights", "samples", "train_steps", "max_drop", "min_speedup")
    changes: dict[str, Any] = {k: given[k] for k in fields if given.get(k) is not None}
    if {"flops", "latency"} & changes.keys():  # what is asked for here stands in place of the recipe's budget
        changes = {"flops": 1.0, "latency": None, **changes}
    if given.get("targets"):
        changes["targets"] = list(dict.fromkeys(given["targets"]))
    if given.get("calibration"):
        changes["calibration"] = [DataSource(path=str(given["calibration"].absolute()))]
    if random:  # synthetic data stand in for all of the recipe's, and nothing can be learned from them
        changes |= {"calibration": [], "training": [], "validation": [], "evaluation": {}, "train_steps": 0, "max_drop": None}
    origin, recipe = recipe.origin, recipe.model_copy(update=changes)
    recipe._origin = origin
    return recipe


def _check_random(given: dict[str, Any]) -> None:
    """Refuses options that ask random weights for what they cannot have.

    Raises:
        InputError: names the option.
    """
    for name, option in (("train_steps", "--train-steps"), ("max_drop", "--max-drop"), ("calibration", "--calibration")):
        if given.get(name):
            reason = "synthetic data go with them" if name == "calibration" else "random weights have learned nothing"
            raise InputError(f"{option} does not go with --random-weights: {reason}", mend=f"leave {option} out")


class Job:
    """A recipe with its source model, and everything that is made of them, each once and when first needed."""

    def __init__(self, recipe: Recipe, options: Options, progress: Progress | None = None):
        self.recipe, self.options, self.progress = recipe, options, progress or Silent()
        own = recipe.origin is not None and recipe.origin not in packaged().values()
        self.scratch: Path | None = None  # where work goes that a run which was killed goes on from
        self.base = recipe.origin.parent if own else Path()  # a packaged recipe means the user's files, not the package's
        self.stopwatch = Stopwatch()  # where the time of compressing goes
        self._held = ExitStack()
        self._temporary: TemporaryDirectory[str] | None = None
        if options.threads:
            import torch

            torch.set_num_threads(options.threads)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._held.__exit__(*error)

    @cached_property
    def checkpoint(self) -> SourceModel:
        from infoprune_export.models.load import locate

        if self.options.random_weights:
            return self._random_checkpoint()
        found = locate(self.recipe.model, self.base, self.recipe.revision, self.recipe.prepare)
        if len(found.types) > 1:
            self.progress.note(f"the weights are of several types ({', '.join(found.types)}); all are computed with in float32")
        return found

    def _random_checkpoint(self) -> SourceModel:
        """Weights of the right shapes, made beside the output and kept there until this job ends."""
        from infoprune_export.models.load import locate, locate_config
        from infoprune_export.models.random_weights import RandomCheckpoint
        from infoprune_export.workspace import check_disk, side_folder

        recipe, options = self.recipe, self.options
        config, name = locate_config(recipe.model, self.base, recipe.revision, recipe.prepare)
        checkpoint = RandomCheckpoint(config, options.seed)
        check_disk(options.out, checkpoint.bytes)
        directory = self._held.enter_context(side_folder(options.out, "random", options.resume))
        self.progress.note(f"random weights in the shapes of {name}: times and sizes mean something, answers do not")
        with self.progress.bar("random weights", checkpoint.tensors) as advance:
            checkpoint.write(directory, advance)
        made = locate(str(directory))
        return dataclasses.replace(made, source=Source(id=f"{name} (random weights)", sha256=made.source.sha256))

    @cached_property
    def device(self) -> torch.device:
        from infoprune_export.compress.devices import device_with_room

        # Training has original and compressed network there, in float32, with room for moments and activations; all else has a layer.
        needed = round(2 * 1.2 * 4 * self.checkpoint.parameters) if self.recipe.train_steps else 0
        return device_with_room(self.options.device, needed, self.progress.note)

    @cached_property
    def original(self) -> nn.Module:
        """The original laid out: a layer has its weights when they are at hand. `factors` uses it up."""
        give_back_large_blocks()
        return self.checkpoint.open_model(self.device)

    def whole_original(self) -> nn.Module:
        """The original with all its weights in memory, as training needs it."""
        with self.progress.step("loading the model"):
            return self.checkpoint.load_model(self.device)

    @cached_property
    def anatomy(self) -> Anatomy:
        return self.checkpoint.anatomy()

    def adopt(self, plan: Plan) -> Plan:
        """Goes on with a plan that was made; what was needed to make it is let go."""
        self.__dict__ |= {"anatomy": plan.anatomy, "workload": plan.workload}
        for used in ("original", "survey", "findings", "batches", "training_rows"):
            self.__dict__.pop(used, None)
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
        from infoprune_export.compress.calibration import fitting, make_batches

        samples = [self._sample(q) for q in self.questions(self.recipe.calibration, self.recipe.samples)]
        context = getattr(self.original.config.get_text_config(), "max_position_embeddings", None)
        return [b.to(self.device) for b in make_batches(fitting(samples, context, self.progress.note))]

    def questions(self, sources: list[DataSource], samples: int | None) -> list[Any]:
        """Questions drawn evenly from several data sets."""
        from infoprune_export.data.vqa import load_questions

        if self.options.random_weights:
            return self._synthetic_questions(samples)
        if not sources:
            raise InputError("no calibration data", where=self.recipe.origin or self.recipe.name, mend="name some with --calibration PATH")
        share = None if samples is None else -(-samples // len(sources))
        drawn = []
        for s in self.resolved(dict(enumerate(sources))).values():
            self._check_prepared(s)
            limits = [x for x in (share, s.samples) if x is not None]
            drawn += load_questions(s.path, s.split, min(limits, default=None), self.options.seed).questions
        return drawn if samples is None else drawn[:samples]

    def _synthetic_questions(self, samples: int | None) -> list[Any]:
        """Random words, as many as the workload has text tokens, each prompt about an image of its own."""
        from infoprune_export.data.synthetic import synthetic_questions

        vocabulary = self.prompts.tokenizer.get_vocab()
        words = sorted((word for word in vocabulary if not word.startswith("<")), key=vocabulary.__getitem__)
        before = len(self.prompts.encode(words[0])) - 1  # what begins every prompt
        return synthetic_questions(
            words,
            samples or self.recipe.samples,
            length=max(1, self.workload.text_tokens - before),
            answer=min(self.workload.new_tokens, SYNTHETIC_ANSWER),
            side=self.images.output_size[0],
            seed=self.options.seed,
        )

    def data_fingerprint(self) -> list[str]:
        """Names the contents of all data that a run reads."""
        from infoprune_export.data.vqa import fingerprint

        recipe = self.recipe
        used = [*recipe.evaluation.values()]
        if recipe.kept < 1 or recipe.train_steps or self.options.plan or not used:
            used += recipe.calibration
        if recipe.train_steps:
            used += [*recipe.training, *recipe.validation]
        sources = self.resolved(dict(enumerate(used))).values()
        for s in sources:
            self._check_prepared(s)
        return [fingerprint(s.path, s.split) for s in sources]

    def _check_prepared(self, source: DataSource) -> None:
        """Tells how to get data that are not there yet, where the recipe knows."""
        if self.recipe.prepare and not source.path.startswith("tiny:") and not Path(source.path).exists():
            raise InputError("does not exist", where=source.path, mend=self.recipe.prepare)

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

    def rows(self, sources: list[DataSource], most: int | None = None) -> list[Row]:
        """Questions about at most so many images, those of one image packed together; which images, the seed decides."""
        import numpy as np

        from infoprune_export.compress.packing import make_rows

        by_image: dict[Any, list[Any]] = {}
        for question in self.questions(sources, None):
            by_image.setdefault(question.image, []).append(question)
        chosen = list(by_image)
        if most is not None and most < len(chosen):
            drawn = np.random.default_rng(self.options.seed).choice(len(chosen), most, replace=False)
            chosen = [chosen[i] for i in sorted(drawn)]
        text = self.original.config.get_text_config()
        context, window = (getattr(text, name, None) for name in ("max_position_embeddings", "sliding_window"))
        images, left_out = [], 0
        for image in chosen:
            asked = [(self.prompt_ids(q.question), self._answer_ids(q)) for q in by_image[image]]
            fit = [(prompt, answer) for prompt, answer in asked if context is None or len(prompt) + len(answer) <= context]
            left_out += len(asked) - len(fit)
            if fit:
                images.append((lambda image=image: self.images([image.open()]), fit))
        if left_out:
            self.progress.note(f"{left_out} questions are longer than the model's context of {context} tokens and are left out")
        return make_rows(images, image_token=self.prompts.config.image_token_id, window=window)

    def _sample(self, question: Any) -> Any:
        from infoprune_export.compress.calibration import Sample

        return Sample(self.prompt_ids(question.question), self._answer_ids(question), self.images([question.image.open()]))

    def _answer_ids(self, question: Any) -> Any:
        import numpy as np

        return self.prompts.encode_answer(question.answers[0]) if question.answers else np.empty(0, np.int64)

    @cached_property
    def survey(self) -> Survey:
        """Pass 1 on disk: beside the bundle where there is one to be, else for as long as this job lives."""
        from infoprune_export.compress.findings import Survey

        return Survey(self._directory("pass1"), self.recipe.criterion)

    def _directory(self, name: str) -> Path:
        return self._spill / name

    @cached_property
    def _spill(self) -> Path:
        from infoprune_export.workspace import side_folder

        options = self.options
        if options.spill is not None:
            return self._held.enter_context(side_folder(options.spill / (options.out.name or "plan"), "spill", options.resume))
        if self.scratch is not None:
            return self.scratch / "spill"
        self._temporary = TemporaryDirectory(prefix="infoprune-", ignore_cleanup_errors=True)
        return Path(self._temporary.name)

    def clear_spill(self) -> None:
        """Removes what only compressing needed."""
        for name in ("pass1", "pass2"):
            shutil.rmtree(self._directory(name), ignore_errors=True)

    @cached_property
    def findings(self) -> Findings:
        from infoprune_export.compress.evidence import passes

        with self.progress.bar("statistics", passes(self.recipe.criterion) * len(list(self.anatomy.layers()))) as advance:
            return self.survey.take(
                self.original,
                self.anatomy,
                self.batches,
                seed=self.options.seed,
                progress=lambda layer: advance(1),
                stopwatch=self.stopwatch,
            )

    def decide(self) -> Plan:
        """The plan: the one given, or the one that the criterion and the budget make."""
        from infoprune_export.compress.decide import keep_everything

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
        if recipe.kept == 1:
            return keep_everything(self.anatomy, **common)
        if recipe.latency is not None:
            _ = self.timed  # before pass 1 takes its time
        plan = self._within_budget(**common)
        steps = round(recipe.recovery.head_share * recipe.train_steps)
        if not steps:
            return plan
        from infoprune_export.compress.gates import learn_heads_of
        from infoprune_export.compress.recover import record_of

        learned = learn_heads_of(
            plan,
            self.whole_original(),
            self.findings,
            self.training_rows,
            steps=steps,
            directory=self.scratch,
            progress=self.progress,
        )
        plan = self._within_budget(heads=learned.heads, **common)
        if learned.steps:
            plan.training = record_of(self.training_rows, self._training_names()).model_copy(update={"head_steps": learned.steps})
        return plan

    def _within_budget(self, **choices: Any) -> Plan:
        """Decides within the recipe's budget, of FLOPs or of time."""
        from infoprune_export.compress.decide import decide

        if self.recipe.latency is None:
            return decide(self.findings, self.anatomy, flops=self.recipe.flops, **choices)
        from infoprune_export.validation.latency_budget import meet_latency

        setting, table = self.timed
        return meet_latency(
            setting,
            table,
            self.recipe.latency,
            lambda asked: decide(self.findings, self.anatomy, latency=asked, table=table, **choices),
            notify=self.progress.note,
        )

    @cached_property
    def timed(self) -> tuple[Setting, TimeTable]:
        """What time is measured for, and the table of this machine."""
        from infoprune_export.validation.stand_ins import Setting
        from infoprune_export.validation.table_cache import table_for

        recipe, where = self.recipe, self.recipe.origin or self.recipe.name
        if set(recipe.targets) == {"trt"}:
            raise InputError("times are measured with ONNX Runtime, and the only target is trt", where=where, mend="use --flops")
        if recipe.criterion.allocation != "ks":
            raise InputError(
                f"criterion.allocation {recipe.criterion.allocation} fixes shares of FLOPs",
                where=where,
                mend="use --flops, or criterion.allocation: ks",
            )
        setting = Setting(self.anatomy, self.workload, recipe.dtype or "fp32", self.options.threads)
        return setting, table_for(setting, notify=self.progress.note, progress=self.progress.counter())

    def _training_names(self) -> list[str]:
        sources = self.recipe.training or self.recipe.calibration
        return [s.path if s.path.startswith("tiny:") else Path(s.path).name for s in sources]

    @cached_property
    def training_rows(self) -> list[Row]:
        """Questions to train on, about no more images than the steps can take in."""
        recipe = self.recipe
        return self.rows(recipe.training or recipe.calibration, most=recipe.train_steps * recipe.recovery.batch)

    def factors(self, plan: Plan) -> Plan:
        """The plan with its factors: those beside a given plan, or new ones. The original is used up where they are new."""
        from infoprune_export.compress.factors import layers_walked, make_factors

        if self.options.plan and plan.training and plan.training.steps and not plan.factors_sha256:
            self.progress.note(f"the plan's factors were trained ({plan.training.steps} steps) and are not here: making training-free ones")
            plan = plan.model_copy(update={"training": None})
        if self.options.plan and plan.factors_sha256:
            factors = read_factors(self.options.plan.with_name("factors.safetensors"), plan.factors_sha256)
        elif plan.is_identity:
            factors = {}
        else:
            _ = self.findings  # pass 2 goes on from pass 1, whoever made the plan
            with self.progress.bar("factors", len(layers_walked(plan))) as advance:
                original, directory = self.__dict__.pop("original"), self._directory("pass2")
                factors = make_factors(
                    original,
                    plan,
                    self.batches,
                    self.survey,
                    progress=lambda _: advance(1),
                    directory=directory,
                    stopwatch=self.stopwatch,
                )
        plan = plan.model_copy()
        plan.factors = factors
        return plan

    def write_network(self, plan: Plan, root: Path) -> None:
        """Writes the weights of the network that a plan with its factors makes of the original."""
        from infoprune_export.compress.network import save_compressed

        with self.progress.step("writing the smaller network"):
            save_compressed(self.__dict__.pop("original", None) or self.checkpoint.open_model(), plan, plan.factors or {}, root)

    def compressed(self, plan: Plan) -> nn.Module:
        """The network that a plan with its factors makes of the original, in memory."""
        from infoprune_export.compress.surgery import apply_plan

        model = self.whole_original()
        apply_plan(model, plan, plan.factors or {})
        return model

    def check_training(self) -> None:
        """Refuses early what training will ask for and this machine lacks.

        Raises:
            MissingRequirement: with the install line.
        """
        from importlib.util import find_spec

        if not self.recipe.train_steps:
            return
        needed = {
            "accelerate": self.device.type != "cpu" or processes() > 1,
            "peft": self.recipe.recovery.by_lora(self.checkpoint.parameters),
        }
        for package, used in needed.items():
            if used and find_spec(package) is None:
                raise MissingRequirement(f"this training needs {package}", mend='pip install "infoprune-export[train]"')

    def make_plan(self) -> Plan:
        """The plan with its factors, trained where the recipe says so."""
        self.check_training()
        plan = self.factors(self.decide())
        return self.recover(plan, self.compressed(plan)) if self.recipe.train_steps else plan

    def recover(self, plan: Plan, model: nn.Module) -> Plan:
        """Trains the smaller model, in place, on the original's answers; gives the plan with what it learned as factors."""
        from infoprune_export.compress.recover import recover

        recipe = self.recipe
        if plan.is_identity:
            self.progress.note("nothing was removed, so there is nothing to train")
            return plan
        original = self.whole_original()
        validation = self.rows(recipe.validation) if recipe.validation else []
        if recipe.validation and not validation:
            self.progress.note("no validation question is left: the state after the last step is kept")
        return recover(
            model,
            original,
            plan,
            self.training_rows,
            recipe.recovery,
            steps=recipe.train_steps - (plan.training.head_steps if plan.training and not self.options.plan else 0),
            data=self._training_names(),
            validation=validation,
            directory=self.scratch,
            progress=self.progress,
            seed=self.options.seed,
        )


def read_plan_for(path: Path, sha256: str) -> Plan:
    """A plan, checked against the model it is to be applied to."""
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
