"""Read a benchmark's files; what is wrong with one is a DataError that names the place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmdpo.errors import DataError

_BLOCK_BYTES = 1 << 20
_NAMES = {int: "a whole number", str: "text"}


def read_text(path: Path) -> str:
    """A file's text. Raises DataError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(
            f"cannot read '{path}': {getattr(problem, 'strerror', None) or problem}"
        ) from problem


def read_json(path: Path) -> Any:
    """A JSON file. Raises DataError."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as problem:  # the latter: nested too deeply
        raise DataError(f"'{path}' is not valid JSON: {problem}") from problem


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, counted from 1, and its object) of a JSON Lines file; empty lines are skipped.

    Raises DataError.
    """
    # Not splitlines: answers may contain other line breaks.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise DataError(f"'{path}' line {number} is not valid JSON: {problem}") from problem
        if not isinstance(entry, dict):
            raise DataError(f"'{path}' line {number} must be a JSON object, not {line[:80]}")
        yield number, entry


def require(entry: Mapping[str, Any], kinds: Mapping[str, type], where: str) -> None:
    """Raise DataError where an entry lacks one of these keys, or holds another kind of value."""
    for key, kind in kinds.items():
        if key not in entry:
            raise DataError(f"{where} lacks {key}")
        if type(entry[key]) is not kind:
            shown = repr(entry[key])[:80]
            raise DataError(
                f"{where}: {key} must be {_NAMES.get(kind, kind.__name__)}, not {shown}"
            )


def require_folder(path: Path, hint: str = "") -> None:
    """Raise DataError, with this hint, unless `--data` is a folder."""
    if path.is_file():
        raise DataError(f"--data: '{path}' is a file; name its folder{hint}")
    if not path.is_dir():
        raise DataError(f"--data: folder '{path}' does not exist{hint}")


def digest(folder: Path, names: Iterable[str]) -> str:
    """A hash of the names and contents of those of these files that are there. Raises DataError."""
    found = hashlib.sha256()
    for name in names:
        path = folder / name
        if not path.is_file():
            continue
        found.update(name.encode())
        try:
            with path.open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    found.update(block)
        except OSError as problem:
            raise DataError(f"cannot read '{path}': {problem.strerror or problem}") from problem
    return found.hexdigest()[:16]
