"""The models that methods are compared on, each with its recipe, its budgets and its questions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from infoprune_export.data.vqa import load_questions
from infoprune_export.errors import InfoPruneError
from infoprune_export.job import Job
from infoprune_export.material import Options
from infoprune_export.recipe import Recipe
from infoprune_export.resolution import resolve
from quality.questions import Asked, Files, Questions, Rendered, Split, files_version
from quality.versions import ROOT, digest

if TYPE_CHECKING:
    from infoprune_export.compress.packing import Row, Tokens
    from quality.exam import Exam

SettingName = Literal["tiny", "smol"]

MORE_ON_A_GPU = 8
"""Times as many images in one pass there: of few, a GPU spends its time on starting operations."""


@dataclass(frozen=True)
class Setting:
    """A model with the questions that it is asked.

    Attributes:
        name: First part of the names of its rows and checks.
        recipe_name: Of the recipe, which names model, calibration data and workload.
        budgets: Fractions of the FLOPs kept, training-free.
        tuned_at: The budget at which parameters are chosen for all of them; None chooses at each.
        train_images: Images of each task of the training split that compressed networks are trained on.
        train_batch: Images of a step of training.
        tune_images: Images of each task of the validation split that parameters are chosen on, the first so many.
        test_images: Likewise of the test split; None for all.
        images_at_a_time: In one pass of the network on a CPU; few, so that activations stay in the processor's cache.
        questions: Where they come from.
    """

    name: SettingName
    recipe_name: str
    budgets: tuple[float, ...]
    tuned_at: float | None
    train_images: int
    train_batch: int
    tune_images: int
    test_images: int | None
    images_at_a_time: int
    questions: Questions

    @cached_property
    def recipe(self) -> Recipe:
        recipe = resolve(self.recipe_name, {})
        return recipe.model_copy(update={"recovery": recipe.recovery.model_copy(update={"batch": self.train_batch})})

    def job(self, recipe: Recipe | None = None, seed: int = 0, device: str = "cpu") -> Job:
        """A job on this model; nothing is written."""
        job = Job(recipe or self.recipe, Options(out=ROOT / "build" / "quality", seed=seed, device=device))
        job.base = ROOT  # a packaged recipe's paths are relative to where one works; this tool's are the checkout's
        return job

    def absent(self) -> str | None:
        """Why this model cannot be compared on here, such as one that has to be built first; None where it can."""
        try:
            self.version()
        except InfoPruneError as e:
            return str(e)
        return None

    def exams(self, job: Job, split: Split, images: int | None = None) -> dict[str, Exam]:
        """The questions of a split, task by task, ready to be put to any network made of this model.

        Args:
            job: Of this setting, for its tokenizer, prompts and image processor.
            split: Which.
            images: The first so many of each task; as the setting says when None.
        """
        from quality.exam import Exam

        padding = job.prompts.eos_ids[0]
        at_a_time = self.images_at_a_time * (1 if job.device.type == "cpu" else MORE_ON_A_GPU)
        return {
            task: Exam(((job.images([image])[0], paths) for image, paths in asked), padding, at_a_time)
            for task, asked in self._encoded(job, split, images).items()
        }

    def training_rows(self, job: Job) -> list[Row]:
        """The questions that every compressed network is trained on, in the form that training takes."""
        from infoprune_export.compress.packing import make_rows

        asked = [x for some in self._encoded(job, "train").values() for x in some]
        images = [((lambda image=image: job.images([image])), paths) for image, paths in asked]
        return make_rows(images, image_token=job.prompts.config.image_token_id)

    def _encoded(self, job: Job, split: Split, images: int | None = None) -> dict[str, Iterator[tuple[Any, list[Tokens]]]]:
        """Images of each task with (prompt, answer) token ids of their questions."""
        most = images or {"train": self.train_images, "val": self.tune_images, "test": self.test_images}[split]

        def encode(asked: Iterable[Asked]) -> Iterator[tuple[Any, list[Tokens]]]:
            for image, questions in islice(asked, most):
                yield image, [(job.prompt_ids(q), job.prompts.encode_answer(a)) for q, a in questions]

        return {task: encode(asked) for task, asked in self.questions.read(job, split).items()}

    def version(self) -> str:
        """Names the model, how it is asked, and the questions that it is calibrated and examined with."""
        job = self.job()
        directory = job.checkpoint.directory
        reading = files_version(p for pattern in ("*token*.json", "*processor*.json", "*.jinja") for p in directory.glob(pattern))
        sources = job.resolved(dict(enumerate(self.recipe.calibration))).values()
        drawn = [q for s in sources for q in load_questions(s.path, s.split).questions]
        calibration = digest([(q.id, q.question, q.answers) for q in drawn]), files_version({q.image.path for q in drawn})
        asked = self.recipe.samples, self.recipe.workload, self.recipe.prompt, self.recipe.calibration
        return digest((job.checkpoint.source.sha256, reading, calibration, asked, self.questions.version(job)))


SETTINGS: dict[str, Setting] = {
    "tiny": Setting("tiny", "tiny-llava", (0.8, 0.6, 0.5, 0.33), None, 1024, 16, 100, None, 8, Rendered()),
    "smol": Setting("smol", "smol-llava", (0.8, 0.6, 0.5), 0.6, 1024, 4, 40, 220, 4, Files()),
}
