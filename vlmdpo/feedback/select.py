"""Which answers become pairs: large differences in score first, and lengths balanced.

A count of denied statements favours short answers, and a model trained on such pairs learns to be
short. So the mean lengths of chosen and rejected answers may not be far apart: pairs that stand out
are replaced by another pair of their prompt, or left out.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import permutations

from vlmdpo.engine.sampling import Sample
from vlmdpo.feedback.scores import Score


@dataclass(frozen=True)
class Scored:
    """The answers to one prompt.

    Attributes:
        key: of the prompt.
        samples, scores: one entry per answer drawn.
    """

    key: str
    samples: Sequence[Sample]
    scores: Sequence[Score]


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, as numbers of its samples."""

    key: str
    chosen: int
    rejected: int
    difference: float  # of their scores
    longer_by: int  # tokens of the chosen answer beyond those of the rejected one
    length: int  # tokens of both


@dataclass
class Selection:
    """The pairs that were picked.

    Attributes:
        skipped: prompts without a pair, and pairs that were left out, by reason.
        replaced: pairs that were replaced by another pair of their prompt, for their lengths.
    """

    pairs: list[Pair] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    replaced: int = 0

    @property
    def mean_lengths(self) -> tuple[float, float]:
        """Tokens of chosen and rejected answers in the mean."""
        count = max(1, len(self.pairs))
        both, more = (sum(getattr(p, n) for p in self.pairs) for n in ("length", "longer_by"))
        return (both + more) / 2 / count, (both - more) / 2 / count


def select(
    prompts: Iterable[Scored], *, per_prompt: int, margin: float, max_length_gap: float
) -> Selection:
    """The pairs of all prompts.

    Args:
        per_prompt: pairs of a prompt at most.
        margin: the smallest difference in score.
        max_length_gap: how far the mean lengths may be apart, as a share of the longer one.
    """
    selection = Selection()
    others: dict[str, list[Pair]] = {}  # a prompt's pairs that were not picked
    for one in prompts:
        found = _candidates(one, margin)
        if not found:
            selection.skipped[_why_none(one)] += 1
        selection.pairs += found[:per_prompt]
        others[one.key] = found[per_prompt:]
    _balance(selection, others, max_length_gap)
    return selection


def _usable(one: Scored) -> list[int]:
    """Answers that may stand in a pair: complete, judged, and no text twice."""
    first: dict[str, int] = {}
    for number, (sample, score) in enumerate(zip(one.samples, one.scores, strict=True)):
        if sample.finished and sample.text and score is not None:
            first.setdefault(_normal(sample.text), number)
    return list(first.values())


def _normal(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _candidates(one: Scored, margin: float) -> list[Pair]:
    """All pairs of a prompt whose scores differ enough: the best first, and of equal ones those
    of like lengths.
    """
    pairs = []
    for better, worse in permutations(_usable(one), 2):
        high, low = one.scores[better], one.scores[worse]
        assert high is not None
        assert low is not None
        if high - low >= margin:
            lengths = one.samples[better].tokens, one.samples[worse].tokens
            pairs.append(
                Pair(one.key, better, worse, high - low, lengths[0] - lengths[1], sum(lengths))
            )
    return sorted(pairs, key=lambda pair: (-pair.difference, abs(pair.longer_by)))


def _why_none(one: Scored) -> str:
    if len({_normal(sample.text) for sample in one.samples}) < 2:
        return "all_answers_equal"
    complete = {_normal(s.text) for s in one.samples if s.finished and s.text}
    if len(complete) < 2:
        return "answers_cut_or_empty"
    if len(_usable(one)) < 2:
        return "unread_verdicts"
    return "no_difference_in_score"


def _balance(selection: Selection, others: dict[str, list[Pair]], max_gap: float) -> None:
    """Replace or leave out the pairs that make one side longer, until the means are close."""
    pairs: dict[int, Pair] = dict(enumerate(selection.pairs))
    longer_by, length = (
        sum(getattr(p, n) for p in pairs.values()) for n in ("longer_by", "length")
    )
    sign, heap = 0, []
    while pairs and abs(longer_by) > max_gap * (length + abs(longer_by)) / 2:
        if sign != (1 if longer_by > 0 else -1):
            sign = 1 if longer_by > 0 else -1
            heap = [_by_length(pair, sign, number) for number, pair in pairs.items()]
            heapq.heapify(heap)
        number = heapq.heappop(heap)[-1]
        worst = pairs.pop(number)
        longer_by, length = longer_by - worst.longer_by, length - worst.length
        better = next((p for p in others[worst.key] if sign * p.longer_by <= 0), None)
        if better is None:
            selection.skipped["pairs_of_unlike_length"] += 1
        else:
            selection.replaced += 1
            others[worst.key].remove(better)
            pairs[number] = better
            longer_by, length = longer_by + better.longer_by, length + better.length
            heapq.heappush(heap, _by_length(better, sign, number))
    selection.pairs = list(pairs.values())


def _by_length(pair: Pair, sign: int, number: int) -> tuple[int, float, int]:
    """Smallest for the pair that adds most to the side of `sign`, and has the least difference."""
    return -sign * pair.longer_by, pair.difference, number
