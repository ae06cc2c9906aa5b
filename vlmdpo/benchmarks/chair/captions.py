"""Which images captions are asked for, and files of captions."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmdpo.benchmarks import files
from vlmdpo.benchmarks.base import Responses
from vlmdpo.errors import DataError

# The keys of an id and its caption: the scorers' own form, and that of answers_<role>.json.
_FORMS = (("image_id", "caption"), ("id", "response"))


def draw(names: Sequence[str], number: int, seed: int) -> list[str]:
    """So many of these names: the first of them after a shuffle seeded by `seed`, so that a smaller
    draw lies within a larger one.
    """
    shuffled = sorted(names)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:number]


def read_ids(path: Path) -> list[int]:
    """Image ids of a file, one per line or in a JSON list. Raises DataError."""
    text = files.read_text(path)
    if text.lstrip().startswith("["):
        found = files.read_json(path)
    else:
        lines = enumerate(text.split("\n"), 1)
        found = [_id(path, number, line.strip()) for number, line in lines if line.strip()]
    wrong = next((entry for entry in found if type(entry) is not int), None)
    if wrong is not None:
        raise DataError(f"--ids: '{path}' must list COCO's image ids, not {wrong!r}"[:300])
    if not found:
        raise DataError(f"--ids: '{path}' lists no id")
    twice = [entry for entry, times in Counter(found).items() if times > 1]
    if twice:
        raise DataError(f"--ids: '{path}' lists {twice[0]} more than once; list each image once")
    return list(found)


def _id(path: Path, number: int, line: str) -> int:
    try:
        return int(line)
    except ValueError as problem:
        raise DataError(
            f"--ids: '{path}' line {number} must be one of COCO's image ids, not {line[:80]!r}"
        ) from problem


def read(path: Path) -> Responses:
    """(image id, caption) of a file, in order, with repetitions.

    A JSON list or JSON Lines, of objects with `image_id` and `caption` (more keys do no harm), or
    with `id` and `response`. Raises DataError.
    """
    found = [_response(entry, where) for where, entry in _entries(path)]
    if not found:
        raise DataError(f"'{path}' holds no caption")
    return found


def _entries(path: Path) -> list[tuple[str, Any]]:
    """(the place, the entry) of each entry of a file."""
    text = files.read_text(path).lstrip()
    if text.startswith("["):
        loaded = files.read_json(path)
        return [(f"'{path}' entry {n} (counted from 0)", entry) for n, entry in enumerate(loaded)]
    return [(f"'{path}' line {number}", entry) for number, entry in files.json_lines(path)]


def _response(entry: Any, where: str) -> tuple[int, str]:
    if not isinstance(entry, dict):
        raise DataError(f"{where} must be an object with image_id and caption")
    for key, value in _FORMS:
        if key in entry:
            files.require(entry, {key: int, value: str}, where)
            return entry[key], entry[value]
    raise DataError(
        f"{where} lacks image_id (with caption) or id (with response): {json.dumps(entry)[:80]}"
    )
