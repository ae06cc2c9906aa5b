"""Rows of JSONL, JSON, CSV and TSV files, as people and programs write them.

A file that cannot be read as its kind is an error; a row that cannot be used is an `UnreadableRow`.
"""

from __future__ import annotations

import contextlib
import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from vlmdpo import ui
from vlmdpo.data.json_rows import parse_at
from vlmdpo.data.reasons import UnreadableRow, first_line, shown
from vlmdpo.errors import DataError

Record = dict[str, Any]
_MAX_LINE = 400_000_000  # characters of a line or cell, which may hold an image as base64
_MAX_JSON = 8_000_000_000  # bytes of a JSON file, which is parsed as a whole
_MAX_NAME = 60  # characters of a column's name
# A number, the end of a sentence, an image's file name, or an image in base64.
_CONTENT = re.compile(r"^[\d.]+$|[.?!]$|\.(jpe?g|png|webp|gif|bmp)$|^(/9j/|iVBOR|data:)", re.I)
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def _encoding(file: Path) -> str:
    with file.open("rb") as handle:
        return "utf-16" if handle.read(2) in _UTF16 else "utf-8-sig"


def lines(
    file: Path,
    encoding: str | None = None,
    *,
    errors: str = "surrogateescape",
    newline: str | None = "\n",
) -> Iterator[str]:
    """The lines of a text file, without byte order marks.

    Bytes that are not UTF-8 become lone surrogates, by which their row is dropped.

    Args:
        encoding: None for UTF-8, or UTF-16 by its byte order mark.
        newline: what ends a line, as for `open`. JSONL has "\\n" only; texts hold other line ends.

    Raises DataError.
    """
    try:
        encoding = encoding or _encoding(file)
        with file.open(encoding=encoding, errors=errors, newline=newline) as handle:
            while line := handle.readline(_MAX_LINE):
                if len(line) == _MAX_LINE:
                    raise DataError(f"'{file}' has a line of {_MAX_LINE:,} characters or more")
                yield line.removeprefix("\ufeff")
    except (OSError, UnicodeError) as problem:
        raise DataError(f"'{file}' cannot be read as text: {first_line(problem)}") from problem


def json_lines(file: Path) -> Iterator[Record]:
    """A row for each line of a JSONL file that is not blank. Raises DataError."""
    for number, line in enumerate(lines(file), start=1):
        if text := line.strip():
            try:
                value, end = parse_at(text, 0)
                if end < len(text):
                    raise ValueError(f"there is more behind column {end}")
            except ValueError as problem:
                yield UnreadableRow("bad_json", f"line {number} is not valid JSON: {problem}")
            else:
                yield _row(value, f"line {number}")


def count_json_lines(file: Path) -> int:
    """The number of rows of `json_lines`."""
    return sum(bool(line.strip()) for line in lines(file))


def is_json_lines(file: Path) -> bool:
    """Whether a .json file holds an object a line instead of one list."""
    first = list(islice((line.strip() for line in lines(file) if line.strip()), 2))
    if len(first) < 2 or not first[0].startswith("{"):
        return False
    try:
        return parse_at(first[0], 0)[1] == len(first[0])
    except ValueError:
        return False


def json_rows(file: Path) -> list[Record]:
    """The rows of a JSON file: a list of objects, or objects one after another.

    Raises DataError.
    """
    if file.stat().st_size > _MAX_JSON:
        raise DataError(f"'{file}' has more than {_MAX_JSON / 1e9:.0f} GB; write it as JSONL")
    text = "".join(lines(file))
    start = _skip(text, 0)
    try:
        if text.startswith("[", start):
            return list(_entries(text, start + 1, file))
        if text.startswith("{", start):
            return _objects(text, start, file)
        value, _ = parse_at(text, start)
    except ValueError as problem:
        raise DataError(f"'{file}' is not valid JSON: {problem}") from problem
    raise DataError(
        f"'{file}' must hold a list of objects, one per row, not {type(value).__name__}"
    )


def _skip(text: str, at: int) -> int:
    """Where white space that begins at `at` ends."""
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _entries(text: str, at: int, file: Path) -> Iterator[Record]:
    """The entries of a JSON list from behind its bracket. One by one, so that each may be bad."""
    number, at = 0, _skip(text, at)
    while not text.startswith("]", at):
        if number:
            if not text.startswith(",", at):
                raise ValueError(
                    f"a comma or bracket is missing behind entry {number - 1} (counted from 0)"
                )
            at = _skip(text, at + 1)
        value, at = parse_at(text, at)
        yield _row(value, f"entry {number} (counted from 0)")
        number, at = number + 1, _skip(text, at)
    if _skip(text, at + 1) < len(text):
        raise ValueError("there is more behind the list")


def _objects(text: str, at: int, file: Path) -> list[Record]:
    """Objects one after another. A single one that only holds others is no row."""
    rows: list[Record] = []
    while at < len(text):
        value, end = parse_at(text, at)
        rows.append(_row(value, f"object {len(rows)} (counted from 0)"))
        at = _skip(text, end)
    only = rows[0]
    if len(rows) == 1 and only and all(isinstance(value, (dict, list)) for value in only.values()):
        names = ", ".join(shown(name).strip("'") for name in list(only)[:5])
        more = ", …" if len(only) > 5 else ""
        raise DataError(f"'{file}' holds one object with keys {names}{more}; give a list of rows")
    return rows


def _row(value: Any, where: str) -> Record:
    if isinstance(value, dict):
        return value
    return UnreadableRow("bad_json", f"{where} holds {type(value).__name__}, not an object")


@dataclass(frozen=True)
class CsvDialect:
    """How a CSV or TSV file is written, and its number of rows."""

    encoding: str
    delimiter: str
    quotes: bool = True
    rows: int = 0


def csv_dialect(file: Path) -> CsvDialect:
    """How a file is written, found by reading it. Raises DataError where it cannot be read.

    TSV has no quotes by its definition, but many programs write them as in CSV.
    """
    encoding = _csv_encoding(file)
    header = next(lines(file, encoding, newline=None), "")
    usual = "\t" if file.suffix.lower() == ".tsv" else ","
    counts = {delimiter: header.count(delimiter) for delimiter in (usual, ";", "\t")}
    delimiter = usual if counts[usual] else max(counts, key=lambda one: counts[one])
    quoted = CsvDialect(encoding, delimiter)
    if delimiter != "\t":
        return replace(quoted, rows=_count(file, quoted)[0])
    plain = replace(quoted, quotes=False)
    rows, ragged = _count(file, plain)
    with contextlib.suppress(DataError):  # a quote that is never closed
        quoted_rows, quoted_ragged = _count(file, quoted)
        if quoted_ragged <= ragged:
            return replace(quoted, rows=quoted_rows)
    return replace(plain, rows=rows)


def _count(file: Path, dialect: CsvDialect) -> tuple[int, int]:
    """(rows, rows of another number of cells than the header's) in a dialect."""
    rows = ragged = 0
    for row in csv_rows(file, dialect):
        rows += 1
        ragged += isinstance(row, UnreadableRow)
    return rows, ragged


def _csv_encoding(file: Path) -> str:
    """UTF-8 or UTF-16 where that is what it is; else what Excel writes in the West."""
    for encoding in (_encoding(file), "cp1252"):
        try:
            for _ in lines(file, encoding, errors="strict", newline=None):
                pass
        except DataError as problem:
            if not isinstance(problem.__cause__, UnicodeError):
                raise
            continue
        if encoding == "cp1252":
            ui.say(f"'{file}' is not UTF-8; it is read as Windows-1252 (Latin-1)")
        return encoding
    return "latin-1"


def csv_rows(file: Path, dialect: CsvDialect) -> Iterator[Record]:
    """The rows of a CSV or TSV file; an empty cell is None. Raises DataError."""
    csv.field_size_limit(_MAX_LINE)  # of the whole process; the default is 131,072
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if dialect.quotes else csv.QUOTE_NONE
    reader = csv.reader(
        lines(file, dialect.encoding, newline=None),
        delimiter=dialect.delimiter,
        quoting=quoting,
        strict=True,
    )
    columns: list[str] | None = None
    number = 0
    try:
        while True:
            number = reader.line_num + 1  # where this row begins
            cells = next(reader, None)
            if cells is None:
                return
            if columns is None:
                columns = _header(cells, file)
            elif cells and len(cells) != len(columns):
                yield UnreadableRow(
                    "ragged_line",
                    f"line {number} has {len(cells)} cells, the header {len(columns)} columns",
                )
            elif cells:
                yield {name: cell or None for name, cell in zip(columns, cells, strict=True)}
    except csv.Error as problem:
        raise DataError(f"'{file}' line {number} is not valid CSV: {problem}") from problem


def _header(cells: list[str], file: Path) -> list[str]:
    twice = [name for number, name in enumerate(cells) if name in cells[:number]]
    if twice:
        raise DataError(
            f"'{file}' has two columns named {shown(twice[0])}; rename or remove one of them"
            f"{no_header_hint(cells)}"
        )
    return cells


def no_header_hint(names: Iterable[str]) -> str:
    """How to mend a table whose first line is a row, for a message that lists its `names` of
    columns; empty where they look like names.
    """
    are_names = all(len(name) <= _MAX_NAME and not _CONTENT.search(name) for name in names)
    return "" if are_names else "; or, if its first line is a row, write the column names above it"
