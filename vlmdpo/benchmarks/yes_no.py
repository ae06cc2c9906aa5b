"""Figures of yes/no questions whose positive class is "yes", and of ours for any reading.

Shapes: n answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from vlmdpo.benchmarks.base import ALL, Figure, Question, Ratio
from vlmdpo.benchmarks.verdict import verdict

if TYPE_CHECKING:
    from vlmdpo.benchmarks.base import Numbers

OURS = "ours"  # the group of figures by our reading


def read_ours(answer: str) -> str | None:
    """ "yes", "no", or None for an answer that does not begin with one of them."""
    said = verdict(answer)
    return said.lower() if said else None


def figures(
    said: Sequence[str | None],
    truths: Sequence[str],
    where: Numbers,
    *,
    counts_unread: bool,
    yes_ratio_of: Numbers | None = None,
) -> dict[str, Figure]:
    """Accuracy, precision, recall, F1 and the ratio of yes, as fractions.

    Args:
        said: n times "yes", "no", or None for an unread answer.
        truths: n times "yes" or "no".
        where: (n,) which answers count.
        counts_unread: whether an unread answer is a wrong one; else it is in no figure.
        yes_ratio_of: (n,) the answers that the ratio of yes is of, if not those of `where`.
    """
    import numpy as np

    yes = np.array([one == "yes" for one in said])
    read = np.array([one is not None for one in said])
    truly = np.array([one == "yes" for one in truths])
    counted = where if counts_unread else where & read
    of_ratio = counted if yes_ratio_of is None else yes_ratio_of
    right = counted & read & (yes == truly)
    true_positive = counted & yes & truly
    precision = Figure((Ratio(true_positive, counted & yes),))
    recall = Figure((Ratio(true_positive, counted & truly),))
    f1 = _harmonic_mean(precision.number, recall.number)
    f1_ratio = Ratio(2 * true_positive, (counted & yes).astype(int) + (counted & truly))
    return {
        "accuracy": Figure((Ratio(right, counted),)),
        "precision": precision,
        "recall": recall,
        "f1": Figure(() if f1 is None else (f1_ratio,), value=f1),
        "yes_ratio": Figure((Ratio(of_ratio & yes, of_ratio),), more_is_better=None),
    }


def _harmonic_mean(precision: float | None, recall: float | None) -> float | None:
    """As scorers compute it, to the last digit; None where they divide by zero."""
    if precision is None or recall is None or not precision + recall:
        return None
    return 2 * precision * recall / (precision + recall)


def by_group(
    answered: Sequence[tuple[Question, str]],
    read: Callable[[str], str | None],
    counted: Numbers,
    *,
    counts_unread: bool = False,
    yes_ratio_of_all: bool = False,
) -> dict[str, Mapping[str, Figure]]:
    """By the questions' groups, and, of several, their mean: see `figures`.

    Args:
        answered: n questions, with the answers in the model's own words.
        read: what an answer says.
        counted: (n,) which answers count.
        yes_ratio_of_all: whether the ratio of yes is of all answers, counted or not.
    """
    import numpy as np

    said = [read(text) for _, text in answered]
    truths = [question.truth for question, _ in answered]
    groups = np.array([question.group for question, _ in answered])
    found: dict[str, Mapping[str, Figure]] = {
        group: figures(
            said,
            truths,
            counted & (groups == group),
            counts_unread=counts_unread,
            yes_ratio_of=groups == group if yes_ratio_of_all else None,
        )
        for group in dict.fromkeys(question.group for question, _ in answered)
    }
    return {**found, ALL: mean_over(found)} if len(found) > 1 else found


def mean_over(splits: Mapping[str, Mapping[str, Figure]]) -> dict[str, Figure]:
    """The mean of each figure over the splits; undefined where it is in one of them."""
    names = next(iter(splits.values()))
    return {name: _mean([split[name] for split in splits.values()]) for name in names}


def _mean(some: Sequence[Figure]) -> Figure:
    numbers = [figure.number for figure in some]
    defined = [number for number in numbers if number is not None]
    is_defined = len(defined) == len(numbers)
    return Figure(
        tuple(ratio for figure in some for ratio in figure.ratios) if is_defined else (),
        more_is_better=some[0].more_is_better,
        value=sum(defined) / len(defined) if is_defined else None,
    )


def first(keys: Sequence[object], *, last: bool = False) -> Numbers:
    """(n,) whether an entry is the first (or the last) one with its key."""
    import numpy as np

    place: dict[object, int] = {}
    for i, key in enumerate(keys):
        if last or key not in place:
            place[key] = i
    found = np.zeros(len(keys), dtype=bool)
    found[list(place.values())] = True
    return found
