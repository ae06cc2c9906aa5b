"""Read an answer as "Yes" or "No", or as neither, without guessing."""

from __future__ import annotations

import re

# What may stand before the first word: spaces, quotes, asterisks, brackets, the dash of a list.
MARKS = " \t\r\n\"'`*_([“”‘’«»-–—•"
# The word must end: "No." and "no, there is" are read, "Nothing", "Not sure" and "no-one" are not.
# The letters by name, because to a pattern that ignores case "ſ" is an s too.
_START = re.compile(rf"^[{re.escape(MARKS)}]*([Yy][Ee][Ss]|[Nn][Oo])(?![\w-])")
_BOTH = re.compile(
    r"\s*(?:/|\bor\b|\band\b)\s*(?:yes|no)\b", re.IGNORECASE
)  # "Yes or no", "Yes/No"
_BEGINS_BOTH = ("/yes", "/no", "or yes", "or no", "and yes", "and no")


def verdict(answer: str) -> str | None:
    """ "Yes" or "No", as AMBER's scorer wants it, or None for an answer that begins otherwise."""
    match = _START.match(answer)
    if match is None or _BOTH.match(answer, match.end()):
        return None
    return match.group(1).capitalize()


def is_settled(answer: str) -> bool:
    """Whether the verdict cannot change any more, whatever follows: the first word has ended, and
    does not begin "yes or no".
    """
    match = _START.match(answer)
    if match is None or match.end() == len(answer):
        return False
    behind = " ".join(answer[match.end() :].lower().replace("/", " /").split()).replace("/ ", "/")
    return not any(both.startswith(behind) for both in _BEGINS_BOTH)
