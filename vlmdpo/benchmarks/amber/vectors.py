"""The word vectors that AMBER's scorer compares words by: spaCy's en_core_web_lg."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from vlmdpo.benchmarks.nltk_data import reason
from vlmdpo.errors import MissingDependencyError, install_command

MODEL = "en_core_web_lg"
SIMILARITY = 0.8  # AMBER's default: words with a higher cosine similarity are one thing
# Of 300 numbers each. en_core_web_lg has had 342,918 (spaCy 3.8), 514,157 (3.4) and 684,830;
# en_core_web_md has 20,000.
_FEWEST_VECTORS = 300_000
_WIDTH = 300
_DOWNLOAD = f"python -m spacy download {MODEL}"


def load() -> tuple[Any, dict[str, Any]]:
    """(spaCy's pipeline, tried on a word; its name, version and numbers of words and vectors).

    Raises MissingDependencyError, also where a model of that name is another one: spaCy loads a
    folder of the working directory as readily.
    """
    try:
        import spacy
    except Exception as problem:  # its compiled parts fail in many ways beside another numpy
        raise _unusable(
            f"spaCy, which cannot be imported ({reason(problem)}): {install_command(extra='amber')}"
        ) from problem
    try:
        pipeline = spacy.load(MODEL)
        facts = _facts(pipeline)
        _check(facts)
        similar_words(pipeline, ("dog", "cat"))
    except MissingDependencyError:
        raise
    except Exception as problem:  # a damaged model raises anything
        raise _unusable(
            f"spaCy's model {MODEL}, which cannot be loaded ({reason(problem)}): {_DOWNLOAD}"
        ) from problem
    return pipeline, facts


def _check(facts: Mapping[str, Any]) -> None:
    """Raise MissingDependencyError if this is another model."""
    found = (facts["name"], facts["width"])
    if found != (MODEL, _WIDTH) or facts["vectors"] < _FEWEST_VECTORS:
        raise _unusable(
            f"spaCy's model {MODEL}, but what is there by that name is {facts['name']} "
            f"{facts['version']} with {facts['vectors']:,} vectors of {facts['width']} numbers, "
            f"not {_FEWEST_VECTORS:,} or more of {_WIDTH}: remove it, and {_DOWNLOAD}"
        )


def _facts(pipeline: Any) -> dict[str, Any]:
    """What identifies a model, counted in its vectors rather than read in its description."""
    meta, vectors = pipeline.meta, pipeline.vocab.vectors
    rows, width = vectors.shape
    return {
        "name": f"{meta['lang']}_{meta['name']}",
        "version": meta["version"],
        "keys": int(vectors.n_keys),
        "vectors": int(rows),
        "width": int(width),
    }


def _unusable(what: str) -> MissingDependencyError:
    return MissingDependencyError(f"--extractor official needs {what}; or use --extractor lexicon")


def similar_words(pipeline: Any, vocabulary: Iterable[str]) -> Mapping[str, frozenset[str]]:
    """For each word, the words of the vocabulary with more than `SIMILARITY` to it.

    A word's vector does not depend on the pipeline's tagger or parser, so only its tokenizer runs.
    """
    docs = {word: pipeline.make_doc(word) for word in sorted(vocabulary)}
    words = list(docs)
    similar: dict[str, set[str]] = {word: set() for word in words}
    with warnings.catch_warnings():
        # spaCy warns where a word has no vector. AMBER's scorer takes its 0 as it is.
        warnings.filterwarnings("ignore", message=r"\[W008\]")
        for i, word in enumerate(words):
            for other in words[i:]:
                if docs[word].similarity(docs[other]) > SIMILARITY:
                    similar[word].add(other)
                    similar[other].add(word)
    return {word: frozenset(others) for word, others in similar.items()}
