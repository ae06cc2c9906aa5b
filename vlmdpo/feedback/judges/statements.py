"""`statements`: each sentence or clause of an answer becomes a yes/no question to the judge model.

All questions about an image are one tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vlmdpo.benchmarks.verdict import verdict
from vlmdpo.data.pairs import question_message
from vlmdpo.data.reasons import BadRow
from vlmdpo.feedback.answerers import Answerer, Reply
from vlmdpo.feedback.judges.base import Claim, Judgment, Statement, Task
from vlmdpo.feedback.judges.split import claims_of

_VERDICT_TOKENS = 16
# (prompt, answer) → its claims; None where it cannot be split.
Splitter = Callable[[str, str], list[Claim] | None]
Claims = Mapping[tuple[str, str], list[Claim] | None]


class StatementsJudge:
    """Asks a model whether the image agrees with each statement.

    Args:
        answerer: the judge model.
        with_log_odds: whether statements get the log-odds of yes against no.
        split: makes claims of a prompt and an answer.
    """

    name = "statements"

    def __init__(
        self, answerer: Answerer, *, with_log_odds: bool = False, split: Splitter = claims_of
    ) -> None:
        self.answerer, self._with_log_odds, self._split = answerer, with_log_odds, split
        self.at_once = answerer.at_once

    def judge(self, tasks: Sequence[Task]) -> list[list[list[Judgment]]]:
        """See `Judge`."""
        claims = self.claims(tasks)
        asked = [(task.image, _questions(task, claims)) for task in tasks]
        replies = self.answerer.ask(asked, _VERDICT_TOKENS, with_log_odds=self._with_log_odds)
        return [
            _judgments(task, claims, dict(zip(questions, of_image, strict=True)))
            for task, (_, questions), of_image in zip(tasks, asked, replies, strict=True)
        ]

    def claims(self, tasks: Sequence[Task]) -> Claims:
        """The claims of each (prompt, answer)."""
        return {pair: self._split(*pair) for task in tasks for pair in answers_in(task)}

    def report(self) -> dict[str, Any]:
        """Nothing: a local model costs only time."""
        return {}


def answers_in(task: Task) -> Iterator[tuple[str, str]]:
    """Each (prompt, answer) of a picture."""
    return ((prompt, answer) for prompt, answers in task.asked for answer in answers)


def _questions(task: Task, claims: Claims) -> list[str]:
    """All questions about a picture that can be asked, each once."""
    questions = (claim.question for pair in answers_in(task) for claim in claims[pair] or ())
    return [one for one in dict.fromkeys(questions) if can_be_asked(one)]


def can_be_asked(question: str) -> bool:
    """Not so where it repeats what no prompt may hold, such as half a character of an answer."""
    try:
        question_message(question)
    except BadRow:
        return False
    return True


def _judgments(task: Task, claims: Claims, replies: Mapping[str, Reply]) -> list[list[Judgment]]:
    def judgment(prompt: str, answer: str) -> Judgment:
        found = claims[prompt, answer]
        if found is None:
            return Judgment(unread="the answer could not be split into statements")
        return Judgment(tuple(_statement(claim, replies.get(claim.question)) for claim in found))

    return [[judgment(prompt, answer) for answer in answers] for prompt, answers in task.asked]


def _statement(claim: Claim, reply: Reply | None) -> Statement:
    """What a claim became; unread where it could not be asked."""
    if reply is None:
        return Statement(claim.text, claim.question, kind=claim.kind)
    read = verdict(reply.text)
    given = None if read is None else read.lower()
    return Statement(claim.text, claim.question, given, claim.kind, reply.log_odds)
