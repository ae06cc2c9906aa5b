"""AMBER's generative scores: CHAIR, Cover, Hal and Cog of descriptions, counted as AMBER's own
scorer counts.

A description's nouns are matched one by one: exactly or through AMBER's lists of words for the same
thing, then by similarity. Each match marks the *first* entry that fits, synonyms before the entries
themselves, so a thing that the annotation lists twice is covered once at most. Safe words count as
nouns and are never hallucinated. A noun that is neither in the picture nor among its likely
hallucinations is hallucinated all the same. Denominators start at 0.001.
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
    """One description: nouns named, those hallucinated, truths covered of all, likely
    hallucinations named of all.
    """

    nouns: int
    hallucinated: tuple[str, ...]
    covered: int
    truths: int
    named_hallu: int
    hallus: int


def count(
    nouns: Sequence[str], asked: Description, vocabulary: Vocabulary, extractor: Extractor
) -> Counts:
    """What one description names, `nouns` being words of the vocabulary in their order."""
    truth, hallu = (_entries(words, vocabulary) for words in (asked.truth, asked.hallu))
    covered: set[int] = set()
    named: set[int] = set()
    hallucinated: list[str] = []
    for noun in nouns:
        if noun in vocabulary.safe:
            continue
        exactly = frozenset((noun,))
        if _mark(covered, truth, exactly):
            continue
        _mark(named, hallu, exactly)
        alike = extractor.alike(noun)
        _mark(named, hallu, alike)
        if not _mark(covered, truth, alike):
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
    """Each word that stands for an entry, and the entry's number: all synonyms first, as AMBER
    looks them up.
    """
    synonyms = [
        (synonym, number)
        for number, word in enumerate(words)
        for synonym in vocabulary.association[word]
    ]
    return synonyms + [(word, number) for number, word in enumerate(words)]


def _mark(marked: set[int], entries: Sequence[tuple[str, int]], wanted: frozenset[str]) -> bool:
    """Mark the first entry with one of the wanted words; whether there is one."""
    for word, number in entries:
        if word in wanted:
            marked.add(number)
            return True
    return False


def figures(counts: Sequence[Counts]) -> dict[str, float]:
    """CHAIR, Cover, Hal and Cog in per cent, one decimal, as AMBER's scorer prints them."""

    def per_cent(part: int, whole: int) -> float:
        return part / (whole + _START) * 100

    clean = sum(not c.hallucinated for c in counts)
    return {
        "chair": round(
            per_cent(sum(len(c.hallucinated) for c in counts), sum(c.nouns for c in counts)), 1
        ),
        "cover": round(per_cent(sum(c.covered for c in counts), sum(c.truths for c in counts)), 1),
        "hal": round(100 - per_cent(clean, len(counts)), 1),
        "cog": round(
            per_cent(sum(c.named_hallu for c in counts), sum(c.hallus for c in counts)), 1
        ),
    }


def count_all(
    descriptions: Mapping[int, Description],
    responses: Sequence[tuple[int, str]],
    vocabulary: Vocabulary,
    extractor: Extractor,
) -> list[tuple[int, Counts]]:
    """(id, counts) of each response, in their order, one that stands twice counted twice. KeyError
    for an unknown id.
    """
    return [
        (n, count(extractor.nouns(text), descriptions[n], vocabulary, extractor))
        for n, text in responses
    ]
