"""Scores of judged answers, and how often a judge orders answers as the truth does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from vlmdpo.feedback.judges.base import Judgment

Score = float | None  # None: an answer with a verdict that cannot be read has none


def denied(judgments: Sequence[Judgment]) -> list[Score]:
    """Minus the number of denied statements, as RLAIF-V counts (arXiv 2405.17220)."""
    return [None if one.unread_verdicts else float(-one.denied) for one in judgments]


def calibrated(judgments: Sequence[Judgment], medians: Mapping[str, float]) -> list[Score]:
    """Minus the expected number of denied statements, each compared with those of its kind.

    A statement counts 1 - sigmoid(log-odds - median of its kind): one half where the judge is as
    sure of it as it usually is. Without that, log-odds of different kinds of questions cannot be
    compared: a model that says yes readily is surer of some kinds than of others.

    Args:
        medians: of `medians_by_kind`.
    """

    def score(one: Judgment) -> Score:
        if one.unread_verdicts:
            return None
        odds = [
            statement.log_odds - medians[statement.kind]
            for statement in one.statements
            if statement.log_odds is not None
        ]
        return -math.fsum(1 / (1 + math.exp(min(value, 700.0))) for value in odds)

    return [score(one) for one in judgments]


def medians_by_kind(judgments: Iterable[Judgment]) -> dict[str, float]:
    """The median log-odds of each kind of statement."""
    by_kind: dict[str, list[float]] = {}
    for one in judgments:
        for statement in one.statements:
            if statement.log_odds is not None:
                by_kind.setdefault(statement.kind, []).append(statement.log_odds)
    return {kind: statistics.median(values) for kind, values in by_kind.items()}


def agreement(
    answers: Iterable[tuple[Sequence[Score], Sequence[Score]]],
) -> tuple[float | None, int]:
    """(the share of pairs of answers that a judge orders as the truth does, how many pairs).

    Only pairs count which both tell apart; None if there are none.

    Args:
        answers: of each prompt, the judge's scores and the true ones.
    """
    same = pairs = 0
    for judged, true in answers:
        for first, second in combinations(range(len(judged)), 2):
            a, b, c, d = judged[first], judged[second], true[first], true[second]
            if a is None or b is None or c is None or d is None or a == b or c == d:
                continue
            pairs += 1
            same += (a > b) == (c > d)
    return (same / pairs if pairs else None), pairs
