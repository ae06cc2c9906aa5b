"""Two texts as HTML with the differing words marked. Everything is escaped."""

from __future__ import annotations

import difflib
import html
import re


def plain(text: str) -> str:
    """A text as HTML, escaped, with its line breaks."""
    return html.escape(text).replace("\n", "<br>")


def marked(left: str, right: str) -> tuple[str, str]:
    """Both texts as HTML, with a mark around words that only one of them has."""
    words = [re.findall(r"\w+|[^\w\s]+|\s+", text) for text in (left, right)]
    shown: tuple[list[str], list[str]] = ([], [])
    matcher = difflib.SequenceMatcher(None, words[0], words[1], autojunk=False)
    for same, a, b, c, d in matcher.get_opcodes():
        for side, piece in ((0, words[0][a:b]), (1, words[1][c:d])):
            text = plain("".join(piece))
            is_marked = same != "equal" and text.strip()
            shown[side].append(f"<mark>{text}</mark>" if is_marked else text)
    return "".join(shown[0]), "".join(shown[1])
