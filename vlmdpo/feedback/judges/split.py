"""An answer as statements, by its punctuation: sentences, and their clauses.

A list after a verb that shows something ("The image shows a dog, a cat and two men") becomes a
statement for each of its things, with the sentence's beginning repeated.
"""

from __future__ import annotations

import re

from vlmdpo.benchmarks.verdict import verdict
from vlmdpo.data.pairs import PLACEHOLDER
from vlmdpo.feedback.judges.base import Claim

# A full stop inside a number or after a single letter or title ends no sentence.
_SENTENCE_END = re.compile(
    r"(?<!\bMr\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bMrs\.)(?<!\b[A-Z]\.)(?<=[.!?])[\"')\]]*\s+"
    r"|\s*;\s+"
)
_BULLET = re.compile(r"^\s*(?:[-*•–]|\d{1,2}[.)])\s+")
_CLAUSE = re.compile(r",?\s+(?:while|whereas|although|but)\s+|,\s+(?:and|so)\s+(?=\S+\s+\S+)")
_SHOWS = re.compile(
    r"^(?P<head>.{0,80}?\b(?:shows?|depicts?|features?|contains?|includes?|displays?|"
    r"there\s+(?:is|are)|(?:i|you|we)\s+(?:can\s+)?see)\b)\s+(?P<things>.+?)(?P<end>[.!?]?)$",
    re.IGNORECASE,
)
_LIST = re.compile(r",\s+(?:and\s+)?|\s+and\s+")
_ARTICLE = re.compile(
    r"^(?:an?|one|two|three|four|five|six|seven|eight|nine|ten|\d+|some|several|many|multiple|"
    r"a\s+few|another|no)\s",
    re.IGNORECASE,
)
_SHORT_WORDS = 3  # an answer of as many words says something only together with its question
STATEMENT = 'Look at the image. Is this statement about it true? "{}" Please answer yes or no.'
ANSWER = 'Look at the image. Is "{}" a right answer to the question "{}"? Please answer yes or no.'


def claims_of(prompt: str, answer: str) -> list[Claim]:
    """The statements of an answer, each once, with the question that asks about it."""
    if verdict(answer) or len(answer.split()) <= _SHORT_WORDS:
        question = ANSWER.format(_quoted(answer), _quoted(prompt))
        return [Claim(answer, question, "answer")] if answer.strip() else []
    texts = dict.fromkeys(clause for one in sentences(answer) for clause in clauses(one))
    return [Claim(text, STATEMENT.format(_quoted(text))) for text in texts]


def _quoted(text: str) -> str:
    # A second mark would be the place of a second image.
    return " ".join(text.replace('"', "'").replace(PLACEHOLDER, " ").split())


def sentences(text: str) -> list[str]:
    """The sentences and list items of a text, without bullets."""
    lines = (_BULLET.sub("", line).replace("**", "") for line in text.split("\n"))
    parts = (part.strip() for line in lines for part in _SENTENCE_END.split(line) if part)
    return [part for part in parts if any(letter.isalnum() for letter in part)]


def clauses(sentence: str) -> list[str]:
    """A sentence's clauses as sentences of their own, and each thing of a list that is shown."""
    parts = [part.strip() for part in _CLAUSE.split(sentence) if part and part.strip()]
    return [thing for part in _whole_clauses(parts) for thing in _things(part)]


def _whole_clauses(parts: list[str]) -> list[str]:
    """Clauses of two words or fewer stay with the one before."""
    whole: list[str] = []
    for part in parts:
        if whole and len(part.split()) < 3:
            whole[-1] = f"{whole[-1]}, {part}"
        else:
            whole.append(part)
    return whole


def _things(clause: str) -> list[str]:
    """ "There is a dog, a cat and a man" as three sentences; any other clause as it is."""
    found = _SHOWS.match(clause)
    if found is None:
        return [clause]
    things = [thing for thing in _LIST.split(found["things"]) if thing]
    if len(things) < 2 or not all(_ARTICLE.match(thing) for thing in things):
        return [clause]
    return [f"{found['head']} {thing}{found['end']}" for thing in things]
