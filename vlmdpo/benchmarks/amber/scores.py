"""AMBER's discriminative scores, to the digit as its own scorer prints them.

The positive class is "No": precision and recall are those of denying.
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
class _Counts:
    """Counts of one dimension's responses."""

    asked: int = 0
    right: int = 0
    truly_no: int = 0
    said_no: int = 0
    rightly_no: int = 0


def score(
    questions: Mapping[int, Question], responses: Iterable[tuple[int, str]]
) -> dict[str, dict[str, float]]:
    """Accuracy, precision, recall and F1 in per cent, one decimal, for each name with a response.

    Like AMBER's scorer it iterates over *responses*: a question without one is not counted, and one
    with two counts twice. Raises KeyError for a response whose id is unknown.
    """
    counts = {dimension: _Counts() for dimension in COVERS["Discriminative"]}
    for number, response in responses:
        question = questions[number]
        count = counts[question.dimension]
        count.asked += 1
        count.right += response.lower() == question.truth and response in ("Yes", "No")
        count.truly_no += question.truth == "no"
        count.said_no += response == "No"
        count.rightly_no += response == "No" and question.truth == "no"
    return {
        name: _figures(name, [counts[d] for d in dimensions])
        for name, dimensions in COVERS.items()
        if any(counts[d].asked for d in dimensions)
    }


def _figures(name: str, counts: list[_Counts]) -> dict[str, float]:
    # AMBER sums counters that start at 0.001: one per name, but three for Attribute.
    start = (3 if name == "Attribute" else 1) * _START

    def percentage(part: int, whole: int) -> float:
        return round(part / (whole + start) * 100, 1)

    rightly_no = sum(t.rightly_no for t in counts)
    precision = percentage(rightly_no, sum(t.said_no for t in counts))
    recall = percentage(rightly_no, sum(t.truly_no for t in counts))
    denominator = precision / 100 + recall / 100 + (0.001 if name == "Existence" else 0.0001)
    return {
        "accuracy": percentage(sum(t.right for t in counts), sum(t.asked for t in counts)),
        "precision": precision,
        "recall": recall,
        "f1": round(2 * (precision / 100) * (recall / 100) / denominator * 100, 1),
    }
