"""Read a model's words as "Yes" or "No", or as neither. Never guesses."""

from __future__ import annotations

import re

# The answer must begin with the word, whatever stands before it in the way of spaces, quotes or
# asterisks, and the word must end there: "No." and "no, there is" are read, "Nothing", "Not sure"
# and "I think so" are not.
_START = re.compile(r"^[\s\"'*_(\[]*(yes|no)\b(?!-)", re.IGNORECASE)


_ENDED = re.compile(_START.pattern.removesuffix(r"\b(?!-)") + r"[^\w-]", re.IGNORECASE)


def verdict(answer: str) -> str | None:
    """ "Yes" or "No" as AMBER's scorer wants it, or None where the answer begins with neither word."""
    match = _START.match(answer)
    return match.group(1).capitalize() if match else None


def settled(answer: str) -> bool:
    """Whether nothing that may yet follow changes the verdict: the first word is read, and
    something ended it.
    """
    return _ENDED.match(answer) is not None
