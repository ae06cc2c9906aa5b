"""Two texts as HTML with the differing words marked. Everything is escaped."""

from __future__ import annotations

import difflib
import html
import re


def plain(text: str) -> str:
    """A text as HTML, escaped, with its line breaks."""
    return html.escape(text).replace("\n", "<br>")


def marked(base: str, tuned: str) -> tuple[str, str]:
    """Both texts as HTML; words in only one of them have the class "only-base" or "only-tuned"."""
    left, right = (re.findall(r"\w+|[^\w\s]+|\s+", text) for text in (base, tuned))
    shown: tuple[list[str], list[str]] = ([], [])
    for same, a, b, c, d in difflib.SequenceMatcher(
        None, left, right, autojunk=False
    ).get_opcodes():
        for side, words, name in ((0, left[a:b], "only-base"), (1, right[c:d], "only-tuned")):
            text = plain("".join(words))
            shown[side].append(
                text
                if same == "equal" or not text.strip()
                else f'<mark class="{name}">{text}</mark>'
            )
    return "".join(shown[0]), "".join(shown[1])
