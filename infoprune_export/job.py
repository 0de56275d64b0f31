"""What is made of a recipe's model and data: findings, plan, factors, the smaller network, each once and when first needed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from infoprune_export.errors import InputError
from infoprune_export.files import write_whole
from infoprune_export.launched import own, processes
from infoprune_export.ledger import foresee
from infoprune_export.material import Material, Options
from infoprune_export.plans import Plan, read_factors
from infoprune_export.precision import Dtype
from infoprune_export.preflight import Work
from infoprune_export.progress import Progress
from infoprune_export.recipe import Recipe
from infoprune_export.requirements import require
from infoprune_export.stopwatch import Stopwatch
from infoprune_export.workspace import beside, side_folder, tree_bytes

if TYPE_CHECKING:
    from torch import nn

    from infoprune_export.compress.findings import Findings, Survey
    from infoprune_export.compress.packing import Row
    from infoprune_export.timetable import TimeTable
    from infoprune_export.validation.stand_ins import Setting


class Job(Material):
    """A recipe's model and data with all that is made of them.

    Attributes:
        scratch: Where work goes that a run which was killed goes on from; temporary when None.
        resumable: Whether a later run of the same inputs is to go on from this one, if it is killed; a dry run leaves nothing.
        stopwatch: Where the time of compressing goes.
    """

    def __init__(self, recipe: Recipe, options: Options, progress: Progress | None = None):
        super().__init__(recipe, options, progress)
        self.scratch: Path | None = None
        self.resumable = False
        self.stopwatch = Stopwatch()
        self._temporary: TemporaryDirectory[str] | None = None

    def adopt(self, plan: Plan) -> Plan:
        """Goes on with a plan that was made; what was needed to make it is let go."""
        self.__dict__ |= {"anatomy": plan.anatomy, "workload": plan.workload}
        for used in ("original", "survey", "findings", "batches", "training_rows"):
            self.__dict__.pop(used, None)
        return plan

    @cached_property
    def survey(self) -> Survey:
        """Pass 1 on disk: beside the bundle where there is one to be, else for as long as this job lives."""
        from infoprune_export.compress.findings import Survey

        return Survey(self._directory("pass1"), self.recipe.criterion)

    def _directory(self, name: str) -> Path:
        return self._spill / name

    @cached_property
    def _spill(self) -> Path:
        options = self.options
        if options.spill is None and self.scratch is not None:
            return self.scratch / "spill"
        if options.spill is None and not self.resumable:
            self._temporary = TemporaryDirectory(prefix="infoprune-", ignore_cleanup_errors=True)
            return Path(self._temporary.name)
        folder = side_folder(
            *self._side(),
            resume=options.resume,
            key=self.key(evaluated=False),
            also=[options.out.absolute().parent],
            option="--spill" if options.spill else "--out",
        )
        return self._held.enter_context(folder)

    @property
    def spill_folder(self) -> Path:
        """This run's folder in the directory that `--spill` names, or beside the output. (A bundle's is in its work folder without it.)"""
        return beside(*self._side())

    def work(self, *, dtypes: Sequence[Dtype] = (), original: bool = False, network: bool = True) -> Work:
        """What this job comes to, for a prediction of what it takes.

        Args:
            dtypes: Of the graphs it exports.
            original: Whether the original's graphs stay.
            network: Whether it writes the smaller network.
        """
        from infoprune_export.compress.evidence import needs_gradients, task_needs
        from infoprune_export.models.load import weight_files

        recipe, given = self.recipe, self.options.plan and Plan.read(self.options.plan)
        factors = recipe.kept < 1 if given is None else not given.is_identity and given.factors_sha256 is None
        return Work(
            anatomy=self.anatomy,
            workload=self.workload,
            parameters=self.checkpoint.parameters,
            stored_bytes=sum(p.stat().st_size for p in weight_files(self.checkpoint.directory)),
            kept=given.budget.predicted if given else recipe.kept,
            samples=recipe.samples if factors else 0,
            weighted=needs_gradients(recipe.criterion),
            answers=task_needs(recipe.criterion),
            dtypes=tuple(dtypes),
            original=original,
            network=network,
            train_steps=recipe.train_steps,
            on_gpu=self.device.type != "cpu",
        )

    def foresee(self, *, network: bool) -> None:
        """Refuses what would not fit, and tells what will take long, where no bundle is made.

        Raises:
            NotEnough: less memory or disk than it takes.
        """
        out, spill = self.options.out.absolute(), self.spill_folder
        foresee(self.work(network=network), out.parent, spill.parent, self.progress.note, spilled=tree_bytes(spill))

    def _side(self) -> tuple[Path, str]:
        """What the folder is beside that outlives a killed run, and its name: a dry run leaves alone what a killed run has there."""
        out, spill = self.options.out, self.options.spill
        return spill / (out.name or "plan") if spill else out, own("spill" if self.resumable else "once")

    def clear_spill(self) -> None:
        """Removes what only compressing needed."""
        shutil.rmtree(self._spill, ignore_errors=True)

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
        """The plan: the one given, that of the killed run that is gone on from, or the one that the criterion and the budget make.

        Deciding twice can come to two plans, since times are measured and heads learned, and the factors that are there fit the first.
        """
        if self.options.plan:
            return read_plan_for(self.options.plan, self.checkpoint.source.sha256)
        if not self.resumable or self.recipe.kept == 1:
            return self._decide()
        decided = self._spill / "plan.json"
        if not decided.is_file():
            plan = self._decide()
            decided.parent.mkdir(parents=True, exist_ok=True)
            write_whole(decided, plan.to_json() + "\n")
        return Plan.read(decided)

    def _decide(self) -> Plan:
        """Decides by the criterion and the budget."""
        from infoprune_export.compress.decide import keep_everything

        recipe, source = self.recipe, self.checkpoint.source
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

        with self.stopwatch.measuring("training"):
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
        if not self.recipe.train_steps:
            return
        needed = {
            "accelerate": self.device.type != "cpu" or processes() > 1,
            "peft": self.recipe.recovery.by_lora(self.checkpoint.parameters),
        }
        require("this training needs", [package for package, used in needed.items() if used], "train")

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
