"""Which of AMBER's nouns a description names, and which are similar. There are two extractors.

"official" does what AMBER's own scorer does: nltk's tagger and lemmatizer, and spaCy's word
vectors. "lexicon" needs no download: every word whose lemma is in AMBER's closed vocabulary counts,
whatever its part of speech, and words are similar only if AMBER's own lists say so. Its figures
cannot be compared with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from vlmdpo.errors import MissingDependencyError, install_command

EXTRACTORS = ("lexicon", "official")
SIMILARITY = 0.8  # AMBER's default: words with a higher cosine similarity are one thing
_DOWNLOADS = (
    "python -m spacy download en_core_web_lg && "
    "python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet"
)
_NLTK_DATA = ("tokenizers/punkt_tab", "taggers/averaged_perceptron_tagger_eng", "corpora/wordnet")
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Extractor:
    """How nouns are found and matched."""

    name: str
    nouns: Callable[[str], list[str]]  # of a text, in order, with repetitions
    similar: Callable[[str], frozenset[str]]  # the words that mean the same thing as a word


def make(name: str, vocabulary: Iterable[str]) -> Extractor:
    """The extractor of that name over a closed vocabulary. Raises MissingDependencyError."""
    words = frozenset(vocabulary)
    return {"lexicon": _lexicon, "official": _official}[name](words)


def _lexicon(vocabulary: frozenset[str]) -> Extractor:
    import lemminflect

    spelling = {word.lower(): word for word in vocabulary}

    @cache
    def noun_of(word: str) -> str | None:
        lemmas = (word, *lemminflect.getLemma(word, upos="NOUN"))
        return next((spelling[lemma] for lemma in lemmas if lemma in spelling), None)

    def nouns(text: str) -> list[str]:
        found = (noun_of(word.lower()) for word in _WORD.findall(text))
        return [noun for noun in found if noun is not None]

    return Extractor("lexicon", nouns, lambda word: frozenset((word,)))


def _official(vocabulary: frozenset[str]) -> Extractor:
    try:
        import nltk
        import spacy
        from nltk.stem import WordNetLemmatizer

        pipeline = spacy.load("en_core_web_lg")
        for data in _NLTK_DATA:
            _require_nltk_data(nltk, data)
    except (ImportError, OSError, LookupError) as problem:
        reason = " ".join(str(problem).split())[:120]
        raise MissingDependencyError(
            f"--extractor official needs nltk, spaCy and their data ({reason}): "
            f"{install_command(extra='amber')} && {_DOWNLOADS}; or use --extractor lexicon"
        ) from problem
    lemmatizer = WordNetLemmatizer()

    def nouns(text: str) -> list[str]:
        tagged = nltk.pos_tag(nltk.word_tokenize(text))
        lemmas = (lemmatizer.lemmatize(word) for word, tag in tagged if tag.startswith("NN"))
        return [lemma for lemma in lemmas if lemma in vocabulary]

    similar = similar_words(pipeline, vocabulary)
    return Extractor("official", nouns, similar.__getitem__)


def _require_nltk_data(nltk: Any, path: str) -> None:
    """Raise LookupError if the data is not installed."""
    try:
        nltk.data.find(path)
    except LookupError:  # some data is unpacked, some is a zip file
        nltk.data.find(f"{path}.zip")


def similar_words(pipeline: Any, vocabulary: Iterable[str]) -> dict[str, frozenset[str]]:
    """For each word, the words of the vocabulary with more than `SIMILARITY` to it.

    A word's vector does not depend on the pipeline's tagger or parser, so only its tokenizer runs.
    """
    docs = {word: pipeline.make_doc(word) for word in sorted(vocabulary)}
    words = list(docs)
    similar: dict[str, set[str]] = {word: set() for word in words}
    for i, word in enumerate(words):
        for other in words[i:]:
            if docs[word].similarity(docs[other]) > SIMILARITY:
                similar[word].add(other)
                similar[other].add(word)
    return {word: frozenset(others) for word, others in similar.items()}
