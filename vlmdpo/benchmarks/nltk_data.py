"""nltk's tokenizer, tagger and lemmatizer, with the data that each needs, tried before use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vlmdpo.errors import MissingDependencyError, install_command

Tagged = list[tuple[str, str]]  # (token, tag of the Penn Treebank)
PUNKT, TAGGER, WORDNET = ("punkt_tab", "averaged_perceptron_tagger_eng", "wordnet")
_DOWNLOAD = f"python -m nltk.downloader {PUNKT} {TAGGER} {WORDNET}"  # again what is damaged, too
T = TypeVar("T")


@dataclass(frozen=True)
class Tools:
    """What nltk does with words.

    Attributes:
        tokenize: the tokens of a text.
        tag: (token, tag) of each token of a text.
        lemma: of a word and its part of speech in WordNet: "n", "v", "a" or "r".
        facts: the versions of nltk and of WordNet.
    """

    tokenize: Callable[[str], list[str]]
    tag: Callable[[Sequence[str]], Tagged]
    lemma: Callable[[str, str], str]
    facts: Mapping[str, str]


def load(needed_for: str, *, instead: str) -> Tools:
    """nltk's tools, after a try of each on a word.

    Args:
        needed_for: the option that needs them.
        instead: the option that does without.

    Raises MissingDependencyError with what is missing or damaged.
    """
    try:
        import nltk
        from nltk.stem import WordNetLemmatizer
        from nltk.tag.perceptron import PerceptronTagger
    except Exception as problem:
        raise MissingDependencyError(
            f"{needed_for} needs nltk, which cannot be imported ({reason(problem)}): "
            f"{install_command('nltk')}; or use {instead}"
        ) from problem

    def usable(name: str, attempt: Callable[[], T]) -> T:
        try:
            return attempt()
        except Exception as problem:  # a damaged file can raise anything
            is_missing = isinstance(problem, LookupError) and "Resource" in str(problem)
            state = "is not installed" if is_missing else f"cannot be used ({reason(problem)})"
            raise MissingDependencyError(
                f"{needed_for} needs nltk's data '{name}', which {state}: {_DOWNLOAD}; or use "
                f"{instead}"
            ) from problem

    lemmatizer = WordNetLemmatizer()
    usable(PUNKT, lambda: nltk.word_tokenize("Two dogs. A cat."))
    # What nltk.pos_tag uses; before nltk 3.10 that loads it anew for every text.
    tagger = usable(TAGGER, PerceptronTagger)
    usable(TAGGER, lambda: tagger.tag(["dogs"]))
    usable(WORDNET, lambda: [lemmatizer.lemmatize("dogs", pos=part) for part in "nvar"])
    return Tools(
        nltk.word_tokenize,
        tagger.tag,
        lambda word, part: lemmatizer.lemmatize(word, pos=part),
        {"nltk": nltk.__version__, "WordNet": nltk.corpus.wordnet.get_version()},
    )


def reason(problem: Exception) -> str:
    """An exception in one line."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:120]}"
