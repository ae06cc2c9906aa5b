"""What a judge is, and what it says about an answer. A new judge is one file beside this one.

A judge looks at several pictures with answers at a time, and says of each answer which statements
about its picture it holds, and which of them are wrong. Scores are computed from that afterwards,
so that another `--margin` or `--judge-score` needs no second look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

YES, NO = "yes", "no"
UNCLEAR = "unclear"  # a verdict too: the image does not show it either way


@dataclass(frozen=True)
class Claim:
    """A statement before it is judged, and the yes/no question that asks about it."""

    text: str
    question: str
    kind: str = "statement"


@dataclass(frozen=True)
class Statement:
    """One statement of an answer.

    Attributes:
        text: the statement, in the words of the answer or of the judge.
        question: what the judge was asked about it; "" where it was not asked in words.
        verdict: whether the image agrees: YES, NO, UNCLEAR, or None where it cannot be read.
        kind: log-odds are compared only between statements of the same kind.
        log_odds: of yes against no, where the judge has probabilities.
    """

    text: str
    question: str = ""
    verdict: str | None = None
    kind: str = ""
    log_odds: float | None = None


@dataclass(frozen=True)
class Judgment:
    """What a judge says about one answer.

    Attributes:
        statements: all of them; none where the answer says nothing about the image.
        unread: why there is no judgment at all; "" if there is one.
    """

    statements: tuple[Statement, ...] = ()
    unread: str = ""

    @property
    def denied(self) -> int:
        """How many statements the judge denies."""
        return sum(one.verdict == NO for one in self.statements)

    @property
    def verdicts(self) -> int:
        """How many verdicts were asked for; a missing judgment counts as one."""
        return len(self.statements) or bool(self.unread)

    @property
    def unread_verdicts(self) -> int:
        """How many of them cannot be read."""
        return sum(one.verdict is None for one in self.statements) or bool(self.unread)


@dataclass(frozen=True)
class Task:
    """One picture with answers to judge.

    Attributes:
        name: of the image, in messages.
        data: the encoded image.
        image: the same, decoded.
        asked: (prompt, its distinct answers).
    """

    name: str
    data: bytes
    image: Image.Image
    asked: tuple[tuple[str, tuple[str, ...]], ...]


class Judge(Protocol):
    """Judges answers about pictures.

    Attributes:
        name: as of `--judge`.
        at_once: how many pictures it looks at together.
    """

    name: str
    at_once: int

    def judge(self, tasks: Sequence[Task]) -> list[list[list[Judgment]]]:
        """For each picture, prompt and answer a judgment.

        Raises BadRow if it cannot take one of the pictures; the caller then tries each alone.
        """
        ...

    def report(self) -> dict[str, Any]:
        """What it cost, for `--json`."""
        ...
