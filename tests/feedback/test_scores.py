"""Scores: denied statements, log-odds only within a kind, and agreement with the truth."""

import math

import pytest

from vlmdpo.feedback import scores
from vlmdpo.feedback.judges.base import NO, UNCLEAR, YES, Judgment, Statement


def _judgment(*verdicts):
    return Judgment(tuple(Statement(f"{i}", verdict=one) for i, one in enumerate(verdicts)))


def test_denied_statements_count_and_an_unread_verdict_leaves_no_score():
    judgments = [
        _judgment(YES, NO, NO),
        _judgment(UNCLEAR, YES),
        _judgment(NO, None),
        Judgment(unread="nonsense"),
    ]
    assert scores.denied(judgments) == [-2.0, 0.0, None, None]
    assert [one.unread_verdicts for one in judgments] == [0, 0, 1, 1]
    assert [one.verdicts for one in judgments] == [3, 2, 2, 1]


def test_log_odds_are_compared_within_their_kind():
    def said(kind, odds):
        return Judgment((Statement("s", verdict=YES, kind=kind, log_odds=odds),))

    # This judge is always sure of numbers and never of states: alone, 1.0 would look worse than 4.
    judgments = [said("number", 4.0), said("number", 6.0), said("state", -1.0), said("state", 1.0)]
    medians = scores.medians_by_kind(judgments)
    assert medians == {"number": 5.0, "state": 0.0}
    found = scores.calibrated(judgments, medians)
    assert found[0] == pytest.approx(found[2]) == pytest.approx(-1 / (1 + math.exp(-1)))
    assert found[1] == pytest.approx(found[3])
    assert found[1] > found[0]


def test_agreement_counts_only_answers_that_both_tell_apart():
    judged = [[0, -1, -1, None], [0, -2]]
    true = [[0, -3, 0, 0], [-1, 0]]
    # (0, 1): same order; (0, 2): equal in truth; (1, 2): equal for the judge; the second: reversed.
    assert scores.agreement(zip(judged, true, strict=True)) == (0.5, 2)
    assert scores.agreement([([0, 0], [0, -1])]) == (None, 0)
