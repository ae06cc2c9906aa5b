"""Nouns without a tagger: words whose lemma is in AMBER's vocabulary, unless they are plainly
verbs where they stand.

Two rules, which look at the words beside it in the same clause, decide that of a word that can be a
verb: "he watches", "trees line the street"; and "can" before a verb: "a dog can be seen". They are
meant to leave nouns alone, so some verbs still count: "a man drinks coffee" names a drink.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache

_TOKEN = re.compile(r"\w+|[^\w\s]")
_WORD = re.compile(r"[^\W\d_]+")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DETERMINERS = _words(
    "a an the this these those every each another some any no my your his her its our their"
)
_NUMBERS = _words("one two three four five six seven eight nine ten several many few")
_SUBJECTS = _words("i he she we they who")
_AFTER_CAN = _SUBJECTS | {"you", "it"}  # "can you see"
_MODALS = _words("can could will would may might must should cannot does do did don doesn didn")
_PREPOSITIONS = _words(
    "about above across after against along among amid around as at atop behind below beneath "
    "beside besides between beyond by down for from in inside into like near of off on onto out "
    "outside over past round through toward towards under underneath up upon via with within "
    "without and or but nor than"
)
# Verbs in a dictionary, but behind a noun nearly always something else.
_NO_VERBS = _words("near down up out over off back next like")
_ADVERBS = _words("also not only still even")  # and those that are nothing else


def noun_finder(vocabulary: frozenset[str]) -> Callable[[str], list[str]]:
    """A function that gives the nouns of a text, in order, with repetitions."""
    import lemminflect

    spelling = {word.lower(): word for word in vocabulary}

    @cache
    def noun_of(word: str) -> str | None:
        lemmas = (word, *lemminflect.getLemma(word, upos="NOUN"))
        return next((spelling[lemma] for lemma in lemmas if lemma in spelling), None)

    @cache
    def lemmas_as_verb(word: str) -> tuple[str, ...]:
        return tuple(lemminflect.getAllLemmas(word, upos="VERB").get("VERB", ()))

    def is_verb(before: str, word: str, after: str) -> bool:
        if not lemmas_as_verb(word):
            return False
        has_object = (
            after in _DETERMINERS
            and before not in _DETERMINERS | _NUMBERS | _PREPOSITIONS
            and not before.endswith("ing")  # "feeding ducks the bread"
            and bool(_WORD.fullmatch(before))
        )
        return before in _SUBJECTS | _MODALS or has_object

    def is_modal(before: str, following: Iterator[str]) -> bool:
        after = next(token for token in following if not is_adverb(token))
        is_base = after in lemmas_as_verb(after) and after not in _NO_VERBS
        return before not in _DETERMINERS and (is_base or after in _AFTER_CAN)

    @cache
    def is_adverb(word: str) -> bool:
        """Whether it may stand between "can" and its verb: "can also be", "can clearly see"."""
        return word in _ADVERBS or set(lemminflect.getAllLemmas(word)) == {"ADV"}

    def nouns(text: str) -> list[str]:
        tokens = ["", *(token.lower() for token in _TOKEN.findall(text)), ""]
        found = []
        for place, token in enumerate(tokens):
            before, following = tokens[place - 1], tokens[place + 1 :]
            for word in _WORD.findall(token):
                noun = noun_of(word)
                if noun is None or (word == "can" and is_modal(before, iter(following))):
                    continue
                if word == "can" or not is_verb(before, word, following[0]):
                    found.append(noun)
        return found

    return nouns
