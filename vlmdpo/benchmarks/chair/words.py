"""CHAIR's word list, which lies beside this module with its licence (LICENSE.txt)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("words.json")


@dataclass(frozen=True)
class WordList:
    """What counts as a mention.

    Attributes:
        category_of: by word, in the singular, the name of COCO's category.
        pairs: by two words with a space between them, the word that they become.
        singular_of: by written form, the word that the original's singulariser makes of it. It
            holds every form of a word that is in `category_of` or part of a pair. A word of
            `category_of` that is not here is one that the singulariser misses: "bus".
        digest: identifies the list.
    """

    category_of: Mapping[str, str]
    pairs: Mapping[str, str]
    singular_of: Mapping[str, str]
    digest: str

    @property
    def categories(self) -> frozenset[str]:
        """The names of COCO's 80 categories."""
        return frozenset(self.category_of.values())


@cache
def load() -> WordList:
    """The word list."""
    content = _FILE.read_bytes()
    found = json.loads(content)
    return WordList(
        _inverse(found["words"]),
        found["pairs"],
        _inverse(found["singular"]),
        hashlib.sha256(content).hexdigest()[:16],
    )


def _inverse(lists: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {entry: name for name, entries in lists.items() for entry in entries}
