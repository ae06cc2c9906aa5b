"""Questions of one's own: a JSONL file of image, question and answer.

An answer is yes or no, or one of the line's `choices`. Lines may have a `group` and an `id`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.benchmarks import files, yes_no
from vlmdpo.benchmarks.base import (
    ALL,
    Asked,
    Figure,
    Id,
    Images,
    Published,
    Question,
    Ratio,
    Responses,
    Sheet,
)
from vlmdpo.benchmarks.image_folder import ImageFolder
from vlmdpo.benchmarks.verdict import is_settled
from vlmdpo.config import EvalConfig
from vlmdpo.errors import DataError

_YES_NO = ("yes", "no")
_DENIAL = re.compile(r"\b(?:not|no|never|neither|nor)\b|n['’]t\b", re.IGNORECASE)


@dataclass(frozen=True)
class OwnQuestion(Question):
    """A question with the answers it may have."""

    choices: tuple[str, ...] = _YES_NO


@dataclass(frozen=True)
class OwnQuestions:
    """A file of questions; `name` is its path."""

    name: str
    title: str
    digest: str
    questions: tuple[OwnQuestion, ...]
    images: Images
    descriptions: tuple[Question, ...] = ()
    rule: str = "vlmdpo: an answer that cannot be read is wrong"
    main: tuple[str, str] = (ALL, "accuracy")
    notes: tuple[str, ...] = ()
    published: tuple[Published, ...] = ()

    @property
    def baseline(self) -> str:
        """Always yes, in a file that asks for nothing else than yes and no."""
        return "yes" if all(question.choices == _YES_NO for question in self.questions) else ""

    def is_settled(self, answer: str) -> bool:
        """Whether Yes or No is said, in a file that asks for nothing else."""
        return bool(self.baseline) and is_settled(answer)

    def read(self, asked: Asked, answer: str) -> str:
        """The answer as it is."""
        return answer

    def read_answers(self, path: Path) -> Responses:
        """A JSON list of {id, response}, as `vlmdpo eval` writes, or JSON lines of id (or, where
        the questions have none, in their order) and `answer`.
        """
        return _read_answers(path, self.questions)

    def score(self, responses: Responses) -> Sequence[Sheet]:
        """One sheet."""
        import numpy as np

        asked = {question.id: question for question in self.questions}
        answered = [asked[number] for number, _ in responses]
        said = [
            read_choice(text, q.choices) for q, (_, text) in zip(answered, responses, strict=True)
        ]
        right = np.array([one == q.truth for one, q in zip(said, answered, strict=True)])
        groups = np.array([q.group for q in answered])
        members = {ALL: np.ones(len(answered), dtype=bool)}
        members |= {name: groups == name for name in dict.fromkeys(groups.tolist()) if name != ALL}
        is_yes_no = np.array([q.choices == _YES_NO for q in answered])
        truths = [q.truth for q in answered]
        figures: dict[str, dict[str, Figure]] = {}
        for name, where in members.items():
            # F1 is of yes; without yes/no questions it is undefined.
            figures[name] = {"accuracy": Figure((Ratio(where & right, where),)), "f1": Figure(())}
            if (where & is_yes_no).any():
                of_yes = yes_no.figures(said, truths, where & is_yes_no, counts_unread=True)
                figures[name] |= {key: of_yes[key] for key in ("f1", "yes_ratio")}
        return [
            Sheet(
                ids=[q.id for q in answered],
                images=[q.image for q in answered],
                groups=figures,
                right=right,
                members=members,
                is_repeat=~yes_no.first([(q.image, q.text) for q in answered]),
                unread=[q.id for q, one in zip(answered, said, strict=True) if one is None],
            )
        ]


def read_choice(answer: str, choices: Sequence[str]) -> str | None:
    """Which of the choices an answer gives; None if it cannot be read without guessing.

    Yes and no are read at the answer's beginning. Another choice is read if it is the only one that
    stands in the answer, as whole words in any case, and nothing is denied there.
    """
    if tuple(choices) == _YES_NO:
        return yes_no.read_ours(answer)
    named = [choice for choice in choices if _holds(answer, choice)]
    # "dark red" also holds "red".
    longest = [
        one for one in named if not any(one != other and _holds(other, one) for other in named)
    ]
    if len(longest) != 1 or (_DENIAL.search(answer) and not _DENIAL.search(longest[0])):
        return None
    return longest[0]


def _holds(text: str, words: str) -> bool:
    return bool(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE))


def load(config: EvalConfig) -> OwnQuestions:
    """The file that `--benchmark` names. Raises DataError."""
    path = Path(config.benchmark)
    suffix = f" {config.suffix}" if config.suffix else ""
    questions = []
    ids: set[Id] = set()
    for line, row in files.json_lines(path):
        question = _question(row, line, f"'{path}' line {line}", suffix)
        if question.id in ids:
            raise DataError(f"'{path}' line {line}: id {question.id!r} is there twice")
        ids.add(question.id)
        questions.append(question)
    if not questions:
        raise DataError(f"'{path}' holds no questions")
    return OwnQuestions(
        name=str(path),
        title=path.stem,
        digest=files.digest(path.parent, [path.name]),
        questions=tuple(questions),
        images=ImageFolder(config.images or path.parent, f"'{path.name}'"),
    )


def _question(row: Mapping[str, Any], line: int, where: str, suffix: str) -> OwnQuestion:
    """One line's question. Raises DataError."""
    files.require(row, {"image": str, "question": str, "answer": str}, where)
    group = row.get("group", ALL)
    if not isinstance(group, str):
        raise DataError(f"{where}: group must be text, not {str(group)[:80]}")
    texts = {"image": row["image"], "question": row["question"], "group": group}
    for key, text in texts.items():
        if not text.strip():
            raise DataError(f"{where}: {key} is empty")
    number = row.get("id", line)
    if type(number) not in (int, str):
        raise DataError(f"{where}: id must be a number or text, not {str(number)[:80]}")
    choices = _choices(row.get("choices"), where)
    truth = next((one for one in choices if one.lower() == row["answer"].strip().lower()), None)
    if truth is None:
        raise DataError(
            f"{where}: answer {row['answer'][:80]!r} is none of {', '.join(choices)}"
            + ("" if "choices" in row else "; name other answers with choices")
        )
    return OwnQuestion(number, row["image"], row["question"] + suffix, truth, group, choices)


def _choices(given: Any, where: str) -> tuple[str, ...]:
    """The answers that a question may have, yes and no by default. Raises DataError."""
    if given is None:
        return _YES_NO
    if not isinstance(given, list) or not all(isinstance(one, str) and one for one in given):
        raise DataError(f"{where}: choices must be a list of texts")
    if len({one.lower() for one in given}) < max(2, len(given)):
        raise DataError(f"{where}: choices must be two or more different texts")
    return _YES_NO if {one.lower() for one in given} == set(_YES_NO) else tuple(given)


def _read_answers(path: Path, questions: Sequence[OwnQuestion]) -> Responses:
    """See `OwnQuestions.read_answers`. Raises DataError."""
    known = {question.id for question in questions}
    if files.read_text(path).lstrip().startswith("["):
        rows = [(f"entry {i} (counted from 0)", row) for i, row in enumerate(files.read_json(path))]
        key = "response"
    else:
        rows = [(f"line {line}", row) for line, row in files.json_lines(path)]
        key = "answer"
    by_order = not any(isinstance(row, dict) and "id" in row for _, row in rows)
    if by_order and len(rows) != len(questions):
        raise DataError(
            f"'{path}' has {ui.count(len(rows), 'answer')} without id, and there are "
            f"{ui.count(len(questions), 'question')}: which is the answer to which cannot be told"
        )
    found: list[tuple[Id, str]] = []
    answered: set[Id] = set()
    for (place, row), question in zip(rows, questions if by_order else rows, strict=True):
        where = f"'{path}' {place}"
        if not isinstance(row, dict) or not (by_order or "id" in row):
            raise DataError(f"{where} must be a JSON object with id and {key}")
        files.require(row, {key: str}, where)
        number = question.id if isinstance(question, OwnQuestion) else row["id"]
        if number not in known:
            raise DataError(f"{where}: there is no question {number!r}")
        if number in answered:
            raise DataError(f"{where}: question {number!r} is answered twice")
        answered.add(number)
        found.append((number, row[key]))
    return found
