"""What a job is given: a recipe's model and data, each read once and when first needed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from infoprune_export import __version__
from infoprune_export.errors import InputError
from infoprune_export.memory import give_back_large_blocks
from infoprune_export.plans import Source
from infoprune_export.progress import Progress, Silent
from infoprune_export.recipe import DataSource, Recipe, Workload, packaged
from infoprune_export.versions import library_versions

if TYPE_CHECKING:
    import torch
    from torch import nn
    from typing_extensions import Self

    from infoprune_export.compress.packing import Row
    from infoprune_export.compress.statistics import Batch
    from infoprune_export.models.anatomy import Anatomy
    from infoprune_export.models.load import SourceModel

Key = TypeVar("Key")
SYNTHETIC_ANSWER = 4
"""Tokens of a synthetic answer at most: those of a benchmark are a word or two."""


@dataclass
class Options:
    """What a run takes beside the recipe.

    Raises:
        InputError: a seed below 0.

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

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InputError(f"seed {self.seed} is below 0", mend="give a whole number from 0 on")


class Material:
    """A recipe's model and data, each read once and when first needed, for as long as a `with` block lasts."""

    def __init__(self, recipe: Recipe, options: Options, progress: Progress | None = None):
        self.recipe, self.options, self.progress = recipe, options, progress or Silent()
        own = recipe.origin is not None and recipe.origin not in packaged().values()
        self.base = recipe.origin.parent if own else Path()  # a packaged recipe means the user's files, not the package's
        self._held = ExitStack()
        if options.threads:
            import torch

            torch.set_num_threads(options.threads)

    def __enter__(self) -> Self:
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
        from infoprune_export.workspace import beside, check_disk, side_folder, tree_bytes

        recipe, options = self.recipe, self.options
        config, name = locate_config(recipe.model, self.base, recipe.revision, recipe.prepare)
        checkpoint = RandomCheckpoint(config, options.seed)
        check_disk(options.out, checkpoint.bytes - tree_bytes(beside(options.out, "random")))
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

    @cached_property
    def workload(self) -> Workload:
        """The recipe's, with the model's own number of image tokens."""
        own, asked = self.anatomy.geometry.image_tokens, self.recipe.workload
        if not asked.images and self.recipe.scope == "vision":
            raise InputError(
                "workload.images is 0, so the vision tower never runs",
                where=self.recipe.origin or self.recipe.name,
                mend="use --scope language, or a workload with images",
            )
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

    def key(self, evaluated: bool = True, **choices: Any) -> str:
        """Names everything that a result depends on: the material, what else was chosen, and the libraries.

        Args:
            evaluated: Whether the result has to do with the evaluation data; the plan and its factors have not.
            choices: What else it depends on.
        """
        plan = self.options.plan
        inputs = {
            "source": self.checkpoint.source.sha256,
            "recipe": self.recipe.model_dump(mode="json"),
            "plan": hashlib.sha256(plan.read_bytes()).hexdigest() if plan else None,
            "seed": self.options.seed,
            "data": self.data_fingerprint(evaluated),
            "device": self.device.type,
            "versions": {"infoprune-export": __version__, **library_versions()},
            **choices,
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def data_fingerprint(self, evaluated: bool = True) -> list[str]:
        """Names the contents of all data that a run reads; those of a plan and its factors alone where nothing is `evaluated`."""
        from infoprune_export.data.vqa import fingerprint

        recipe = self.recipe
        used = [*recipe.evaluation.values()] if evaluated else []
        if recipe.kept < 1 or recipe.train_steps or self.options.plan or (evaluated and not used):
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
