"""From a caption to its mentions of COCO's objects: CHAIR's rules, which both scorers share.

A scorer differs only in the words that it makes of a caption, so it is one function and its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmdpo.benchmarks.chair.words import WordList


@dataclass(frozen=True)
class Scorer:
    """How words are found.

    Attributes:
        name: as in `--scorer`.
        rule: whose rule it is, in words.
        words: of a caption, its tokens in order, punctuation included, each in the singular or as a
            lemma; "" for one that is not among CHAIR's words.
        word_list: what counts.
        facts: everything else that its figures depend on.
    """

    name: str
    rule: str
    words: Callable[[str], list[str]]
    word_list: WordList
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Caption:
    """What a caption says: its length, and (word, category) of each mention, in order."""

    words: int
    mentions: tuple[tuple[str, str], ...]


def read(caption: str, scorer: Scorer) -> Caption:
    """The mentions of a caption; one that is repeated is there again."""
    words = _join_pairs(scorer.words(caption), scorer.word_list.pairs)
    length = len(words)
    if "toilet" in words and "seat" in words:  # "the seat of the toilet" is not a chair
        words = [word for word in words if word != "seat"]
    categories = scorer.word_list.category_of
    return Caption(length, tuple((word, categories[word]) for word in words if word in categories))


def _join_pairs(words: Sequence[str], pairs: Mapping[str, str]) -> list[str]:
    """Words with each two that are a pair made one, from left to right."""
    joined: list[str] = []
    place = 0
    while place < len(words):
        pair = pairs.get(" ".join(words[place : place + 2]))
        joined.append(words[place] if pair is None else pair)
        place += 1 if pair is None else 2
    return joined
