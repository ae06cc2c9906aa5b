"""Read an answer as "Yes" or "No", or as neither, without guessing."""

from __future__ import annotations

import re

# The answer must begin with the word, after spaces, quotes or asterisks, and the word must end
# there: "No." and "no, there is" are read, "Nothing", "Not sure" and "I think so" are not.
_START = re.compile(r"^[\s\"'*_(\[]*(yes|no)\b(?!-)", re.IGNORECASE)
_ENDED = re.compile(_START.pattern.removesuffix(r"\b(?!-)") + r"[^\w-]", re.IGNORECASE)


def verdict(answer: str) -> str | None:
    """ "Yes" or "No", as AMBER's scorer wants it, or None for an answer that begins otherwise."""
    match = _START.match(answer)
    return match.group(1).capitalize() if match else None


def is_settled(answer: str) -> bool:
    """Whether the verdict cannot change any more, whatever follows: the first word has ended."""
    return _ENDED.match(answer) is not None
