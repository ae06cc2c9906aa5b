"""The scorer of CHAIR's authors, without the library `pattern` that it uses for singulars."""

from __future__ import annotations

import re
from importlib.metadata import version

from vlmdpo.benchmarks.chair import words
from vlmdpo.benchmarks.chair.mentions import Scorer

# A full stop, also behind these, ends no sentence: nltk's word_tokenize, which needs downloaded
# data to know, leaves it on the word.
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"])"
    r"(?:(?:[a-z]\.)*[a-z]|ave|co|corp|dr|ft|inc|jr|lt|ltd|mr|mrs|ms|prof|sr|st|vs)\.$"
)
_SENTENCE_END = re.compile(r"[.!?]['\")\]]*\s+")


def make() -> Scorer:
    """The scorer "pattern"."""
    from nltk.tokenize.destructive import NLTKWordTokenizer

    nltk = version("nltk")
    tokenize = NLTKWordTokenizer().tokenize
    word_list = words.load()

    def singular_words(caption: str) -> list[str]:
        tokens = [token for sentence in sentences(caption.lower()) for token in tokenize(sentence)]
        return [word_list.singular_of.get(token, "") for token in tokens]

    return Scorer(
        "pattern",
        f"CHAIR's original rules: words made singular as the library pattern does (nltk {nltk})",
        singular_words,
        word_list,
        {"nltk": nltk},
    )


def sentences(text: str) -> list[str]:
    """The sentences of a text in lower case: nltk's tokenizer takes a full stop off a word only at
    a sentence's end.
    """
    found, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        if not _ABBREVIATION.search(text[start : end.start() + 1]):
            found.append(text[start : end.end()].strip())
            start = end.end()
    return [*found, text[start:].strip()]
