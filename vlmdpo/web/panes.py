"""The parts of the page of `vlmdpo compare` as HTML and sentences. All text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmdpo import ui
from vlmdpo.engine.side_by_side import ROLES, AnswerScore
from vlmdpo.web.votes import Tally
from vlmdpo.web.word_diff import marked, plain

SIDES = ("left", "right")
EMPTY = "<span class='soft'>Pick an example, or upload an image, and ask.</span>"
WAITING = "<span class='soft'>…</span>"


@dataclass(frozen=True)
class Exchange:
    """One question with both answers, to vote on.

    Attributes:
        image: the file that was asked about.
        base, tuned: the answers.
        order: the roles on the left and on the right.
        scores: the table of log-probs, as HTML.
    """

    image: str
    question: str
    base: str
    tuned: str
    order: tuple[str, str] = ROLES
    scores: str = ""

    @property
    def answers(self) -> tuple[str, str]:
        """The answers on the left and on the right."""
        first, second = (self.base if role == "base" else self.tuned for role in self.order)
        return first, second


def pane(side: str, heading: str, text: str, role: str = "") -> str:
    """A pane; `text` is HTML. `role` is left out where it is not to be known."""
    known = f" {role}" if role else ""
    return (
        f'<div class="pane{known}" id="{side}"><h3 dir="auto">{plain(heading)}</h3>'
        f'<div class="text" dir="auto">{text}</div></div>'
    )


def blind(texts: tuple[str, str] = (EMPTY, EMPTY)) -> list[str]:
    """Both panes without names; the texts are HTML."""
    return [pane(side, side.capitalize(), text) for side, text in zip(SIDES, texts, strict=True)]


def named(
    names: tuple[str, str],
    texts: tuple[str, str] = (EMPTY, EMPTY),
    order: tuple[str, str] = ROLES,
    preferred: str = "",
    *,
    in_place: bool = False,
) -> list[str]:
    """Both panes with the models' names, and which of them was preferred; the texts are HTML.

    On a narrow screen the tuned model's is above, unless they stay `in_place`.
    """
    by_role = dict(zip(ROLES, names, strict=True))
    return [
        pane(
            side,
            f"{role}: {by_role[role]}{' ✓ preferred' if role == preferred else ''}",
            text,
            "" if in_place else role,
        )
        for side, text, role in zip(SIDES, texts, order, strict=True)
    ]


def both(exchange: Exchange) -> tuple[str, str]:
    """The answers as HTML, with the words that differ marked."""
    return marked(*exchange.answers)


def score_table(scores: Sequence[AnswerScore], beta: float) -> str:
    """Log-probs and rewards of both answers, as an HTML table."""
    rows = "".join(
        f"<tr><td>{role}'s</td><td>{one.tokens}</td><td>{one.base_logp:.2f}</td>"
        f"<td>{one.tuned_logp:.2f}</td><td>{one.reward:+.3f}</td></tr>"
        for role, one in zip(ROLES, scores, strict=True)
    )
    margin = scores[1].reward - scores[0].reward
    return (
        '<div class="figures"><table><tr><th>Answer</th><th>tokens</th><th>log-prob by '
        "base</th><th>by tuned</th>"
        f"<th>reward</th></tr>{rows}</table><p>Reward margin, tuned's answer − base's: "
        f"<b>{margin:+.3f}</b>. "
        f"A reward is {beta:g} × (log-prob by tuned − by base), in nats.</p></div>"
    )


def tally_sentence(tally: Tally) -> str:
    """The votes so far, in words."""
    rate = tally.win_rate
    if rate is None:
        said = "No vote for either model yet."
    else:
        share, (low, high) = rate
        said = (
            f"Tuned preferred in {tally.tuned} of {tally.decided} decided votes: {share:.0f}% "
            f"(95% interval {low:.0f} to {high:.0f}%)."
        )
    others = [(tally.ties, "tie", "ties"), (tally.neither, "for neither", "for neither")]
    counts = [f"{count} {one if count == 1 else more}" for count, one, more in others if count]
    return f"{said} {', '.join(counts)}{'.' if counts else ''}".strip()


def progress_sentence(at: int | None, done: int, total: int) -> str:
    """Where one is among the examples."""
    if not total:
        return ""
    where = f"Example {at + 1} of {total}" if at is not None else ui.count(total, "example")
    return f"{where}, {done} voted on."


def written(lines: int, file: Path) -> str:
    """That a vote was written, as Markdown."""
    return f"Written: {lines} preference{'' if lines == 1 else 's'} in `{file}`."
