"""What the page of `vlmdpo compare` does: ask both models, hide which is which, write votes.

Knows nothing of gradio: each event gives a `View` for the page to show.
"""

from __future__ import annotations

import dataclasses
import hmac
import random
import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.data.images import open_file
from vlmdpo.data.reasons import BadImage, BadRow, foreign
from vlmdpo.engine.side_by_side import ROLES, Answer, SideBySide
from vlmdpo.errors import is_out_of_memory, out_of_memory_reason
from vlmdpo.web import panes
from vlmdpo.web.examples import Example
from vlmdpo.web.panes import SIDES, Exchange
from vlmdpo.web.votes import VoteFile, stored_image
from vlmdpo.web.word_diff import plain

MAX_QUESTION = 2000  # characters
_SAME_ANSWERS = "Both answers are the same: only an answer of your own can be preferred to it."
_NO_MEMORY = "There is too little memory for this question: try a smaller image."
_EMPTY_ANSWER = "An empty answer can be neither preferred nor rejected; write the correct one."
_OTHER_PAGE = "This page is of an earlier start of vlmdpo compare: reload it."
_ALL_VOTED = "All examples are voted on."


@dataclass(frozen=True)
class Session:
    """One visitor's page.

    Attributes:
        exchange: what can be voted on now.
        cast: names of votes with what they were about, the last one last.
        at: number of the example, where `ask_next` chose it.
    """

    exchange: Exchange | None = None
    cast: tuple[tuple[str, Exchange], ...] = ()
    at: int | None = None


@dataclass(frozen=True)
class View:
    """What a page shows after an event.

    Attributes:
        panes: left and right, as HTML; None leaves them as they are.
        scores: HTML below them; None likewise.
        status: Markdown.
        can_choose: whether left, right and tie can be voted for.
        can_answer: whether an answer of one's own can be preferred.
        progress: Markdown; None leaves it.
    """

    session: Session
    status: str
    panes: Sequence[str] | None = None
    scores: str | None = None
    can_choose: bool = False
    can_answer: bool = False
    progress: str | None = None


@dataclass
class Voting:
    """The models, what they are asked, and where votes go.

    Args:
        models: base and tuned model, asked one question at a time.
        names: their names, as shown.
        examples: questions to go through.
        file: the votes.
        max_new_tokens: longest answer.
        is_blind: whether the models' names are shown only after the vote.
    """

    models: SideBySide
    names: tuple[str, str]
    examples: Sequence[Example]
    file: VoteFile
    max_new_tokens: int
    is_blind: bool = True
    token: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    _written: dict[str, int] = field(default_factory=dict)  # preferences of each vote
    _random: random.Random = field(default_factory=random.SystemRandom)
    _lock: Any = field(default_factory=threading.Lock)

    @property
    def votes(self) -> int:
        """Preferences that this page wrote, less those that were taken back."""
        return sum(self._written.values())

    def empty_panes(self) -> list[str]:
        """Both panes before anything is asked."""
        return panes.blind() if self.is_blind else panes.named(self.names)

    def greeting(self) -> str:
        """The first status."""
        return f"Votes go to `{self.file.file}`."

    def progress(self, at: int | None = None) -> str:
        """How many examples are voted on, and what the votes say, as Markdown."""
        asked = self.file.asked()
        done = sum(key in asked for key in self._keys)
        parts = (
            panes.progress_sentence(at, done, len(self.examples)),
            panes.tally_sentence(self.file.tally()),
        )
        return "  \n".join(part for part in parts if part)

    @cached_property
    def _keys(self) -> list[tuple[str, str]]:
        """How votes name the examples."""
        return [(stored_image(e.image)[0], e.question) for e in self.examples]

    def ask(
        self, token: str, session: Session, image: str | None, question: str | None
    ) -> Iterator[View]:
        """Both answers as they grow, then with marks. A question that does not fit into memory is
        refused, and the page goes on.
        """
        session = dataclasses.replace(session, exchange=None)
        if not self._is_ours(token):
            yield View(session, _OTHER_PAGE)
            return
        try:
            yield from self._answer(session, image, (question or "").strip())
        except (RuntimeError, MemoryError) as problem:
            if not is_out_of_memory(problem):
                raise
            ui.warn(f"a question did not fit into memory: {out_of_memory_reason(problem)}")
            yield View(session, _NO_MEMORY, self.empty_panes(), "")

    def ask_next(self, token: str, session: Session) -> Iterator[tuple[Example | None, View]]:
        """The next example that is not voted on, and the views of asking it."""
        example, at = None, session.at
        if self._is_ours(token):
            asked = self.file.asked()
            first = 0 if at is None else at + 1
            order = [*range(first, len(self.examples)), *range(first)][: len(self.examples)]
            at = next((number for number in order if self._keys[number] not in asked), None)
            example = self.examples[at] if at is not None else None
            if example is None:
                yield None, View(session, _ALL_VOTED, progress=self.progress())
                return
        session = dataclasses.replace(session, at=at)
        image, question = (str(example.image), example.question) if example else (None, None)
        for view in self.ask(token, session, image, question):
            yield example, view

    def _is_ours(self, token: object) -> bool:
        return hmac.compare_digest(str(token).encode(), self.token.encode())

    def _answer(self, session: Session, image: str | None, question: str) -> Iterator[View]:
        opened, refusal = self._checked(image, question)
        if opened is None:
            yield View(session, refusal, self.empty_panes(), "")
            return
        swapped = self.is_blind and self._random.random() < 0.5
        order: tuple[str, str] = (ROLES[1], ROLES[0]) if swapped else ROLES
        base, tuned = Answer(), Answer()
        for base, tuned in self.models.stream(opened, question, self.max_new_tokens):
            texts = {"base": plain(base.text), "tuned": plain(tuned.text)}
            growing = texts[order[0]], texts[order[1]]
            if self.is_blind and not self.models.in_one_batch:
                growing = panes.WAITING, panes.WAITING  # the base model's would come first
            yield View(session, "…", self._panes(growing, order), "")
        if self.models.is_closed:
            return
        scores = self.models.score(opened, question, (base, tuned))
        table = panes.score_table(scores, self.models.beta)
        exchange = Exchange(str(image), question, base.text, tuned.text, order, table)
        yield self._to_vote(dataclasses.replace(session, exchange=exchange), exchange)

    def _to_vote(self, session: Session, exchange: Exchange, status: str = "") -> View:
        is_same = exchange.base == exchange.tuned
        return View(
            session,
            status or (_SAME_ANSWERS if is_same else "Which is better?"),
            self._panes(panes.both(exchange), exchange.order),
            "" if self.is_blind else exchange.scores,
            can_choose=not is_same,
            can_answer=True,
            progress=self.progress(session.at),
        )

    def _panes(self, texts: tuple[str, str], order: tuple[str, str]) -> list[str]:
        if self.is_blind:
            return panes.blind(texts)
        return panes.named(self.names, texts, order)

    def _checked(self, image: str | None, question: str) -> tuple[Any, str]:
        """(opened image, ""), or (None, why it cannot be asked)."""
        from vlmdpo.engine.generate import model_inputs

        if not image or not question:
            return None, "Choose an image and type a question."
        if len(question) > MAX_QUESTION:
            return None, f"A question may have up to {MAX_QUESTION:,} characters."
        try:
            opened = open_file(Path(image))
        except BadImage as problem:
            return None, f"This image cannot be used: {plain(str(problem))}"
        try:
            with foreign(BadRow, "processor_refuses"):
                model_inputs(self.models.model, self.models.processor, [opened], [question])
        except BadRow as problem:
            return None, f"This question cannot be asked: {plain(str(problem))}"
        return opened, ""

    def vote(self, token: str, session: Session, choice: str, correct: str = "") -> View:
        """Write one vote, and show the names.

        Args:
            choice: "left", "right", "tie" or "neither".
            correct: the user's own answer, for "neither".
        """
        exchange = session.exchange
        if not self._is_ours(token):
            return View(session, _OTHER_PAGE)
        if exchange is None:
            return View(session, "Ask first.")
        preferred = exchange.order[SIDES.index(choice)] if choice in SIDES else choice
        pairs = _pairs(exchange, preferred, correct)
        if preferred == "neither" and not pairs:
            return self._again(session, "Write an answer that differs from these two.")
        if not all(text for pair in pairs for text in pair) and preferred != "tie":
            return self._again(session, _EMPTY_ANSWER)
        try:
            name = self.file.cast(Path(exchange.image), exchange.question, pairs, preferred)
            status = panes.written(self.file.preferences(), self.file.file)
        except (OSError, BadImage) as problem:
            return self._again(session, f"Not written: {plain(str(problem))}")
        with self._lock:
            self._written[name] = 0 if preferred == "tie" else len(pairs)
        session = Session(None, (*session.cast, (name, exchange)), session.at)
        return View(
            session,
            "Noted as a tie, which does not count as a preference."
            if preferred == "tie"
            else status,
            panes.named(
                self.names,
                panes.both(exchange),
                exchange.order,
                preferred,
                in_place=self.is_blind,
            ),
            exchange.scores,
            progress=self.progress(session.at),
        )

    def _again(self, session: Session, why: str) -> View:
        """The vote is still to come."""
        exchange = session.exchange
        assert exchange is not None
        return View(session, why, can_choose=exchange.base != exchange.tuned, can_answer=True)

    def undo(self, token: str, session: Session) -> View:
        """Take the session's last vote back, and let its question be voted on again."""
        if not self._is_ours(token):
            return View(session, _OTHER_PAGE)
        if not session.cast:
            return View(session, "There is no vote of this page to take back.")
        name, exchange = session.cast[-1]
        try:
            self.file.retract(name)
        except OSError as problem:
            return View(session, f"Not taken back: {plain(str(problem))}")
        with self._lock:
            self._written.pop(name, None)
        session = Session(exchange, session.cast[:-1], session.at)
        return self._to_vote(session, exchange, "Taken back. Which is better?")


def _pairs(exchange: Exchange, preferred: str, correct: str) -> list[tuple[str, str]]:
    """(chosen, rejected) of a vote; for a tie both answers, and none for a correct answer that is
    missing or one of the two.
    """
    base, tuned = exchange.base, exchange.tuned
    if preferred == "neither":
        rejected = [] if correct in ("", base, tuned) else dict.fromkeys((tuned, base))
        return [(correct, answer) for answer in rejected]
    return [(base, tuned) if preferred == "base" else (tuned, base)]
