"""Read the lists of a large JSON object entry by entry, in one pass, with the standard library.

COCO's files are one object whose lists hold up to 600,000 entries. Only one entry and a buffer are
in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from vlmdpo.errors import DataError

_CHUNK = 1 << 20  # characters read at once
_LONGEST = 1 << 24  # characters of one entry: the longest of COCO's have 100,000
_SPACE = " \t\r\n"


def entries(path: Path, names: Collection[str]) -> Iterator[tuple[str, int, Any]]:
    """(name of its list, its number counted from 0, the entry) of the named lists of an object.

    What else the object holds is skipped. Raises DataError for a file that cannot be read, that is
    no JSON object, or that is cut short.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            stream = _Stream(file)
            try:
                yield from (found for found in _lists(stream) if found[0] in names)
            except ValueError as problem:
                if isinstance(problem, UnicodeDecodeError):
                    raise
                raise DataError(
                    f"'{path}' is not valid JSON, or cut short, at character "
                    f"{stream.position:,}: unpack or download it again"
                ) from problem
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(
            f"cannot read '{path}': {getattr(problem, 'strerror', None) or problem}"
        ) from problem


def _lists(stream: _Stream) -> Iterator[tuple[str, int, Any]]:
    """Every entry of every list of the object. Raises ValueError."""
    stream.take("{")
    if stream.peek() == "}":
        return
    while True:
        name = stream.value()
        stream.take(":")
        if stream.peek() == "[":
            yield from ((name, number, entry) for number, entry in enumerate(_items(stream)))
        else:
            stream.value()
        if stream.take(",}") == "}":
            return


def _items(stream: _Stream) -> Iterator[Any]:
    stream.take("[")
    if stream.peek() == "]":
        stream.take("]")
        return
    while True:
        yield stream.value()
        if stream.take(",]") == "]":
            return


class _Stream:
    """The text of a file from one place on."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._at = 0
        self._dropped = 0  # characters before `_text`
        self._decode = json.JSONDecoder().raw_decode

    @property
    def position(self) -> int:
        """Characters before what comes next."""
        return self._dropped + self._at

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def take(self, wanted: str) -> str:
        """The next character, which must be one of `wanted`. Raises ValueError."""
        found = self.peek()
        if not found or found not in wanted:
            raise ValueError(f"{found!r} instead of one of {wanted!r}")
        self._at += 1
        return found

    def value(self) -> Any:
        """The next value. Raises ValueError."""
        self.peek()
        while True:
            try:
                found, end = self._decode(self._text, self._at)
            except RecursionError as problem:
                raise ValueError("nested too deeply") from problem
            except ValueError:  # perhaps only because the rest is not read yet
                if len(self._text) - self._at > _LONGEST or not self._read_on():
                    raise
            else:
                if end < len(self._text) or not self._read_on():  # a number may go on
                    self._at = end
                    return found

    def _read_on(self) -> bool:
        """Whether there was more to read."""
        chunk = self._file.read(_CHUNK)
        if chunk:
            self._dropped += self._at
            self._text = self._text[self._at :] + chunk
            self._at = 0
        return bool(chunk)
