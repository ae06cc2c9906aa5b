"""Read the lists of a large JSON object entry by entry: COCO's hold up to 600,000 entries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vlmdpo.errors import DataError


def entries(path: Path, names: Iterable[str]) -> Iterator[tuple[str, int, Any]]:
    """(name of its list, its number counted from 0, the entry) of the named lists of an object.

    The file is read once for each list; only one entry is in memory at a time. Raises DataError for
    a file that cannot be read or is not valid JSON.
    """
    import ijson

    try:
        for name in names:
            with path.open("rb") as file:
                found = ijson.items(file, f"{name}.item", use_float=True)
                for number, entry in enumerate(found):
                    yield name, number, entry
    except OSError as problem:
        raise DataError(f"cannot read '{path}': {problem.strerror or problem}") from problem
    except (ijson.JSONError, UnicodeDecodeError) as problem:
        reason = " ".join(str(problem).split())[:120]
        raise DataError(
            f"'{path}' is not valid JSON, or cut short ({reason}): unpack or download it again"
        ) from problem
