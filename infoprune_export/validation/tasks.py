"""Questions of an evaluation set put to a network, and the official scores of its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infoprune_export.data.vqa import ImageRef, QuestionSet, load_questions, metric_name, score
from infoprune_export.errors import InputError
from infoprune_export.recipe import DataSource
from infoprune_export.runtime.images import ImageProcessor
from infoprune_export.runtime.prompts import Prompts
from infoprune_export.runtime.session import Session
from infoprune_export.validation import accuracy
from infoprune_export.validation.generation import Limits
from infoprune_export.validation.records import Accuracy

ANSWER_TOKENS = 16
"""Where an answer is cut; the benchmarks' answers are a word or a few."""


@dataclass(frozen=True)
class Exam:
    """One task's questions, as text and as token ids."""

    questions: QuestionSet
    examples: list[accuracy.Example]

    def record(
        self, original: Sequence[float] | None, compressed: Sequence[float], quantised: Sequence[float] | None, engine: str, dtype: str
    ) -> Accuracy:
        """The report's entry, from the score of every question."""
        metric = metric_name(self.questions.format)
        return accuracy.record(original, compressed, quantised, metric=metric, engine=engine, dtype=dtype)


class Examiner:
    """Puts questions to networks that share a tokenizer and an image processor: a bundle's and its original's."""

    def __init__(self, directory: Path, template: str, limits: Limits, progress: Callable[[str, int, int], None]):
        """
        Args:
            directory: The bundle.
            template: Prompt where the model has no chat template.
            limits: Of the engine that will answer.
            progress: Told what is under way, how many questions are answered, and of how many.
        """
        self.prompts = Prompts.from_directory(directory, template)
        self.processor = ImageProcessor.from_directory(directory)
        self.limits, self.progress = limits, progress

    def prepare(self, source: DataSource) -> Exam:
        """Loads a task's questions.

        Raises:
            InputError: data that is missing or malformed, questions without answers, or prompts too long for the engine.
        """
        questions = load_questions(source.path, source.split, source.samples)
        if unanswered := [q.id for q in questions.questions if not q.answers]:
            raise InputError(
                f"{len(unanswered)} of {len(questions)} questions have no answers to score against (the first: {unanswered[0]})",
                where=source.path,
                mend="name a split that has them",
            )
        examples = [accuracy.Example(q.image, self.prompts.encode(q.question, images=1)) for q in questions.questions]
        longest, most = max(len(e.input_ids) for e in examples), self.limits.tokens
        if most is not None and longest + ANSWER_TOKENS > most:
            raise InputError(
                f"the longest prompt takes {longest} tokens and the answer {ANSWER_TOKENS}, the engine {most}",
                where=source.path,
                mend="build the engine for a longer workload, or evaluate through ort",
            )
        return Exam(questions, examples)

    def sit(self, exam: Exam, session: Session, name: str) -> list[float]:
        """The official score of a network's answer to every question.

        Args:
            exam: The task.
            session: The network.
            name: For the progress.
        """
        total, done = len(exam.examples), 0

        def count(answered: int) -> None:
            nonlocal done
            done += answered
            self.progress(name, done, total)

        self.progress(name, 0, total)
        answers = accuracy.answer(
            session,
            exam.examples,
            self._pixels,
            self.prompts.eos_ids,
            max_new_tokens=ANSWER_TOKENS,
            limits=self.limits,
            progress=count,
        )
        texts = [self.prompts.decode(tokens).strip() for tokens in answers]
        return [score(exam.questions.format, text, q.answers) for text, q in zip(texts, exam.questions.questions, strict=True)]

    def sit_all(self, exams: Mapping[str, Exam], session: Session, network: str) -> dict[str, list[float]]:
        """Scores of one network on every task."""
        return {task: self.sit(exam, session, f"{task}, {network}") for task, exam in exams.items()}

    def _pixels(self, image: ImageRef) -> np.ndarray:
        return self.processor([image.open()])
