"""AMBER's generative scores: CHAIR, Cover, Hal and Cog, counted as its own scorer counts.

A description's nouns are matched one by one: exactly or through AMBER's lists of words for the same
thing, then by similarity. Each match marks the *first* entry that fits, synonyms before the entries
themselves, so a thing that the annotation lists twice is covered at most once. Safe words count as
nouns and are never hallucinated. A noun that is neither in the image nor among its likely
hallucinations counts as hallucinated too. Denominators start at 0.001.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmdpo.benchmarks.amber.nouns import Extractor
from vlmdpo.benchmarks.amber.questions import Description, Vocabulary

_START = 0.001
FIGURES = ("chair", "cover", "hal", "cog")


@dataclass(frozen=True)
class Counts:
    """Counts of one description."""

    nouns: int
    hallucinated: tuple[str, ...]
    covered: int  # annotated things that are named
    truths: int  # annotated things
    named_hallu: int  # likely hallucinations that are named
    hallus: int  # likely hallucinations


def count(
    nouns: Sequence[str], asked: Description, vocabulary: Vocabulary, extractor: Extractor
) -> Counts:
    """Count one description by its nouns: words of the vocabulary, in order."""
    truth, hallu = (_entries(words, vocabulary) for words in (asked.truth, asked.hallu))
    covered: set[int] = set()
    named: set[int] = set()
    hallucinated: list[str] = []
    for noun in nouns:
        if noun in vocabulary.safe:
            continue
        exact = frozenset((noun,))
        if _mark_first(covered, truth, exact):
            continue
        _mark_first(named, hallu, exact)
        similar = extractor.similar(noun)
        _mark_first(named, hallu, similar)
        if not _mark_first(covered, truth, similar):
            hallucinated.append(noun)
    return Counts(
        len(nouns),
        tuple(hallucinated),
        len(covered),
        len(asked.truth),
        len(named),
        len(asked.hallu),
    )


def _entries(words: Sequence[str], vocabulary: Vocabulary) -> list[tuple[str, int]]:
    """(word, index of its entry): all synonyms first, as AMBER looks them up."""
    synonyms = [
        (synonym, number)
        for number, word in enumerate(words)
        for synonym in vocabulary.association[word]
    ]
    return synonyms + [(word, number) for number, word in enumerate(words)]


def _mark_first(
    marked: set[int], entries: Sequence[tuple[str, int]], wanted: frozenset[str]
) -> bool:
    """Mark the first entry that has one of the wanted words. Returns whether there is one."""
    for word, number in entries:
        if word in wanted:
            marked.add(number)
            return True
    return False


def figures(counts: Sequence[Counts]) -> dict[str, float]:
    """CHAIR, Cover, Hal and Cog in per cent, one decimal, as AMBER's scorer prints them."""

    def percentage(part: int, whole: int) -> float:
        return part / (whole + _START) * 100

    clean = sum(not c.hallucinated for c in counts)
    return {
        "chair": round(
            percentage(sum(len(c.hallucinated) for c in counts), sum(c.nouns for c in counts)), 1
        ),
        "cover": round(
            percentage(sum(c.covered for c in counts), sum(c.truths for c in counts)), 1
        ),
        "hal": round(100 - percentage(clean, len(counts)), 1),
        "cog": round(
            percentage(sum(c.named_hallu for c in counts), sum(c.hallus for c in counts)), 1
        ),
    }


def count_all(
    descriptions: Mapping[int, Description],
    responses: Sequence[tuple[int, str]],
    vocabulary: Vocabulary,
    extractor: Extractor,
) -> list[tuple[int, Counts]]:
    """(id, counts) of each response, in order; one that occurs twice is counted twice.

    Raises KeyError for an unknown id.
    """
    return [
        (n, count(extractor.nouns(text), descriptions[n], vocabulary, extractor))
        for n, text in responses
    ]
