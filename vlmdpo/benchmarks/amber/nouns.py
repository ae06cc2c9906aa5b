"""Which of AMBER's nouns a description names, and which are similar. There are two extractors.

"official" does what AMBER's own scorer does: nltk's tagger and lemmatizer, and spaCy's word
vectors. "lexicon" needs no download: every word whose lemma is in AMBER's closed vocabulary counts,
unless it is plainly a verb, and words are similar only if AMBER's own lists say so. Its figures
cannot be compared with published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmdpo.benchmarks import nltk_data
from vlmdpo.benchmarks.amber import lexicon, vectors

EXTRACTORS = ("lexicon", "official")


@dataclass(frozen=True)
class Extractor:
    """How nouns are found and matched.

    Attributes:
        nouns: of a text, in order, with repetitions.
        similar: the words that mean the same thing as a word.
        facts: what identifies the model that similarity is of; empty without one.
    """

    name: str
    nouns: Callable[[str], list[str]]
    similar: Callable[[str], frozenset[str]]
    facts: Mapping[str, Any] = field(default_factory=dict)


def make(name: str, vocabulary: Iterable[str]) -> Extractor:
    """The extractor of that name over a closed vocabulary, tried on a word where it needs data.

    Raises MissingDependencyError.
    """
    words = frozenset(vocabulary)
    return {"lexicon": _lexicon, "official": _official}[name](words)


def _lexicon(vocabulary: frozenset[str]) -> Extractor:
    return Extractor("lexicon", lexicon.noun_finder(vocabulary), lambda word: frozenset((word,)))


def _official(vocabulary: frozenset[str]) -> Extractor:
    tools = nltk_data.load("--extractor official", instead="--extractor lexicon")
    pipeline, facts = vectors.load()

    def nouns(text: str) -> list[str]:
        tagged = tools.tag(tools.tokenize(text))
        lemmas = (tools.lemma(word, "n") for word, tag in tagged if tag.startswith("NN"))
        return [lemma for lemma in lemmas if lemma in vocabulary]

    similar = vectors.similar_words(pipeline, vocabulary)
    return Extractor("official", nouns, similar.__getitem__, facts)
