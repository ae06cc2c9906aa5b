"""JSON from data: rows that are nested too deeply or hold a key twice get a reason."""

from __future__ import annotations

import json
import re
from typing import Any

from vlmdpo.data.reasons import BadRow, UnreadableRow, shown

MAX_DEPTH = 64  # of lists and objects within one another; real data has fewer than ten
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]')


def _as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRow("duplicate_key", f"the key {shown(twice)} stands twice in one object")
    return made


# Not strict: texts may hold line ends and other control characters as they are.
_DECODER = json.JSONDecoder(object_pairs_hook=_as_object, strict=False)


def parse_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and where it ends.

    A value that cannot be used becomes an `UnreadableRow`: an object with a key twice, more than
    `MAX_DEPTH` levels, a number of thousands of digits. Raises ValueError for anything that is not
    JSON.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except BadRow as problem:
        return UnreadableRow(problem.reason, str(problem)), _end_of_value(text, start)
    except RecursionError:
        return _too_deep(), _end_of_value(text, start)
    except ValueError as problem:  # int() has a limit of 4,300 digits
        return UnreadableRow("bad_json", str(problem)), _end_of_value(text, start)
    brackets = text.count("[", start, end) + text.count("{", start, end)
    return (_too_deep() if brackets > MAX_DEPTH and _depth(value) > MAX_DEPTH else value), end


def parse(text: str) -> Any:
    """A cell or line of JSON. Raises BadRow where it cannot be used, ValueError for no JSON."""
    stripped = text.strip()
    value, end = parse_at(stripped, 0)
    if end < len(stripped):
        raise json.JSONDecodeError("Extra data", stripped, end)
    if isinstance(value, UnreadableRow):
        raise value.problem()
    return value


def _too_deep() -> UnreadableRow:
    return UnreadableRow(
        "nested_too_deeply", f"more than {MAX_DEPTH} lists or objects within one another"
    )


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        inner = [one for one in level if isinstance(one, (dict, list))]
        depth += bool(inner)
        level = [
            child for one in inner for child in (one.values() if isinstance(one, dict) else one)
        ]
    return depth


def _end_of_value(text: str, start: int) -> int:
    """Where the list or object that begins at `start` ends, without parsing it."""
    depth = 0
    for found in _TOKEN.finditer(text, start):
        depth += (found[0] in "[{") - (found[0] in "]}")
        if depth == 0:
            return found.end()
    raise json.JSONDecodeError("Unterminated list or object", text, start)
