"""`truth`: annotations in AMBER's layout judge, where there are some of the images at hand.

A yes/no question is judged by its annotated answer. Any other answer about an annotated image is
taken for a description, and its nouns are looked up as AMBER looks them up, with the lexicon that
needs no download.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from vlmdpo import ui
from vlmdpo.benchmarks.amber import generative, nouns, questions
from vlmdpo.benchmarks.verdict import verdict
from vlmdpo.feedback.judges.base import NO, YES, Judgment, Statement, Task

NOT_ANNOTATED = "the image or question is not annotated"


class Truth(Protocol):
    """What is known about images."""

    def of(self, image: str, prompt: str, answer: str) -> Judgment:
        """The true judgment of an answer; unread with NOT_ANNOTATED where nothing is known."""
        ...


class AmberTruth:
    """Annotations of a folder in AMBER's layout.

    Raises DataError where the folder cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._data = questions.read(folder)
        if self._data.is_amber:
            ui.warn(
                f"--truth: '{folder}' is AMBER itself: pairs made with it teach its answers, and "
                "a model trained on them must not be scored on AMBER"
            )
        self._questions = {(one.image, one.text): one for one in self._data.questions}
        self._descriptions = {one.image: one for one in self._data.descriptions}

    def of(self, image: str, prompt: str, answer: str) -> Judgment:
        """See `Truth`."""
        image = Path(image).name
        question = self._questions.get((image, prompt))
        if question is not None:
            return _of_question(question, answer)
        described = self._descriptions.get(image)
        if described is None or self._data.vocabulary is None:
            return Judgment(unread=NOT_ANNOTATED)
        found = self._extractor.nouns(answer)
        counts = generative.count(found, described, self._data.vocabulary, self._extractor)
        wrong = set(counts.hallucinated)
        return Judgment(
            tuple(
                Statement(noun, verdict=NO if noun in wrong else YES, kind="noun")
                for noun in dict.fromkeys(found)
            )
        )

    @cached_property
    def _extractor(self) -> nouns.Extractor:
        assert self._data.vocabulary is not None
        return nouns.make("lexicon", self._data.vocabulary.words)


def _of_question(question: questions.Question, answer: str) -> Judgment:
    given = verdict(answer)
    if given is None:
        return Judgment(unread="the answer begins neither with yes nor with no")
    right = given.lower() == question.truth
    return Judgment((Statement(given, question.text, YES if right else NO, "answer"),))


class TruthJudge:
    """Judges by what is known."""

    name = "truth"
    at_once = 1  # the image, which is opened, is not looked at

    def __init__(self, truth: Truth) -> None:
        self._truth = truth

    def judge(self, tasks: Sequence[Task]) -> list[list[list[Judgment]]]:
        """See `Judge`."""
        return [
            [
                [self._truth.of(task.name, prompt, answer) for answer in answers]
                for prompt, answers in task.asked
            ]
            for task in tasks
        ]

    def report(self) -> dict[str, Any]:
        """Nothing."""
        return {}
