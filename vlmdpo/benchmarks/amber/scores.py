"""AMBER's discriminative scores, digit by digit as its own scorer prints them.

The positive class is "No": precision and recall are of saying that something is not so.
Denominators start at 0.001, not 0; F1 is computed from precision and recall *after* rounding, with
0.0001 added below (0.001 for existence). Only exact "Yes" and "No" count; any other response is
wrong and is neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vlmdpo.benchmarks.amber.questions import Question

# Printed name → the question dimensions it covers, in AMBER's order.
COVERS: dict[str, tuple[str, ...]] = {
    "Discriminative": ("Existence", "State", "Number", "Action", "Relation"),
    "Existence": ("Existence",),
    "Attribute": ("State", "Number", "Action"),
    "State": ("State",),
    "Number": ("Number",),
    "Action": ("Action",),
    "Relation": ("Relation",),
}
_START = 0.001


@dataclass
class _Tally:
    asked: int = 0
    right: int = 0
    truly_no: int = 0
    said_no: int = 0
    rightly_no: int = 0


def score(
    questions: Mapping[int, Question], responses: Iterable[tuple[int, str]]
) -> dict[str, dict[str, float]]:
    """Accuracy, precision, recall and F1 in per cent, one decimal, for each name in COVERS that has
    a response.

    Like AMBER's, it goes through the *responses*: a question without one is not counted, one with
    two counts twice. Raises KeyError for a response to no question.
    """
    tallies = {dimension: _Tally() for dimension in COVERS["Discriminative"]}
    for number, response in responses:
        question = questions[number]
        tally = tallies[question.dimension]
        tally.asked += 1
        tally.right += response.lower() == question.truth and response in ("Yes", "No")
        tally.truly_no += question.truth == "no"
        tally.said_no += response == "No"
        tally.rightly_no += response == "No" and question.truth == "no"
    return {
        name: _figures(name, [tallies[d] for d in dimensions])
        for name, dimensions in COVERS.items()
        if any(tallies[d].asked for d in dimensions)
    }


def _figures(name: str, tallies: list[_Tally]) -> dict[str, float]:
    # AMBER adds up one counter a line, started at 0.001, but three for Attribute.
    start = (3 if name == "Attribute" else 1) * _START

    def per_cent(part: int, whole: int) -> float:
        return round(part / (whole + start) * 100, 1)

    rightly_no = sum(t.rightly_no for t in tallies)
    precision = per_cent(rightly_no, sum(t.said_no for t in tallies))
    recall = per_cent(rightly_no, sum(t.truly_no for t in tallies))
    below = precision / 100 + recall / 100 + (0.001 if name == "Existence" else 0.0001)
    return {
        "accuracy": per_cent(sum(t.right for t in tallies), sum(t.asked for t in tallies)),
        "precision": precision,
        "recall": recall,
        "f1": round(2 * (precision / 100) * (recall / 100) / below * 100, 1),
    }
