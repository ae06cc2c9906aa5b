"""Sources of rows, cut into units of work that any process can read on its own.

A source does not know what its columns mean (see `schemas`). If a format allows random access, a
unit only says which rows it has; if it can only be streamed, the unit carries its rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.data.reasons import UnreadableRow, first_line
from vlmdpo.errors import DataError

Record = dict[str, Any]
UNIT_ROWS = 256  # rows of a unit, the most that a killed run has to repeat
_FIRST_ROWS = 64  # looked at to recognize the schema
_UNIT_BYTES = 32_000_000  # of a streamed unit, which is sent to another process
# Larger Parquet row groups are streamed: they can only be read from their start.
_ROW_GROUP_ROWS = 2_000


@dataclass(frozen=True)
class Unit:
    """Rows `first` to `last` (exclusive) of a source; `records` holds them if they are streamed.

    Attributes:
        part: which source of several.
        offset: rows of the sources before it.
    """

    number: int
    first: int
    last: int
    records: list[Record] | None = None
    part: int = 0
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class Source:
    """A readable source.

    Attributes:
        name: as the user gave it.
        fingerprint: changes whenever the content does.
        count: number of rows, or None if only reading tells.
        root: the folder that image paths start from.
        columns: those known without reading a row.
        allowed: more folders that links in `root` may lead to.
    """

    name: str
    fingerprint: str
    count: int | None
    root: Path
    columns: tuple[str, ...] = ()
    allowed: tuple[Path, ...] = ()

    def units(self, first: int, last: int | None) -> Iterator[Unit]:
        """Rows `first` to `last` in units, the same at every call."""
        raise NotImplementedError

    def rows(self, unit: Unit) -> Iterator[Record]:
        """The rows of a unit."""
        raise NotImplementedError

    def first_row(self, is_known: Callable[[Record], bool] = lambda row: True) -> Record:
        """A row to recognize the schema by: the first that `is_known` accepts, else the first.

        Raises DataError if there is none.
        """
        found: list[Record] = []
        for last in (1, _FIRST_ROWS):  # a stream may be slow, so try one row first
            units = self.units(0, last if self.count is None else min(last, self.count))
            found = [row for unit in units for row in self.rows(unit)]
            readable = [row for row in found if not isinstance(row, UnreadableRow)]
            known = next((row for row in readable if is_known(row)), None)
            if known is not None:
                return known
        if readable:
            return readable[0]
        why = f" that can be read; the first: {found[0]['detail']}" if found else ""
        raise DataError(f"'{self.name}' has no rows{why}")


@dataclass(frozen=True, kw_only=True)
class Streamed(Source):
    """A source that is read from its start: text files, archives, the Hub's streams.

    Attributes:
        stream: opens the source and yields its rows.
    """

    stream: Callable[[], Iterable[Record]] = field(repr=False)

    def units(self, first: int, last: int | None) -> Iterator[Unit]:
        """Rows in order; a unit ends when it has enough rows or bytes."""
        return split_into_units(self.stream(), first, last)

    def rows(self, unit: Unit) -> Iterator[Record]:
        """The rows that the unit carries."""
        assert unit.records is not None
        return iter(unit.records)

    def __getstate__(self) -> dict[str, Any]:
        # Only the parent process streams, and `stream` (a closure) cannot be pickled.
        return {**self.__dict__, "stream": None}


def split_into_units(
    rows: Iterable[Record], first: int, last: int | None, number: int = 0, start: int = 0
) -> Iterator[Unit]:
    """Rows `first` to `last` as units numbered from `number`; the stream starts at row `start`."""
    held: list[Record] = []
    size, begin = 0, max(first, start)
    for at, row in enumerate(rows, start=start):
        if last is not None and at >= last:
            break
        if at < first:
            continue
        held.append(row)
        size += _bytes_of(row)
        if len(held) == UNIT_ROWS or size >= _UNIT_BYTES:
            yield Unit(number, begin, at + 1, held)
            number, begin, held, size = number + 1, at + 1, [], 0
    if held:
        yield Unit(number, begin, begin + len(held), held)


def _bytes_of(value: Any) -> int:
    """The approximate size of a cell."""
    if isinstance(value, (bytes, str)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_bytes_of, value.values()))
    return sum(map(_bytes_of, value)) if isinstance(value, (list, tuple)) else 8


@dataclass(frozen=True, kw_only=True)
class ArrowRows(Source):
    """A `datasets.Dataset` on disk, which is pickled as file names, not rows."""

    dataset: Any = field(repr=False)

    def units(self, first: int, last: int | None) -> Iterator[Unit]:
        """Equal slices."""
        last = self.count if last is None else last
        assert last is not None
        for number, start in enumerate(range(first, last, UNIT_ROWS)):
            yield Unit(number, start, min(last, start + UNIT_ROWS))

    def rows(self, unit: Unit) -> Iterator[Record]:
        """The slice, one row at a time."""
        return as_stored(self.dataset.select(range(unit.first, unit.last)))


def as_stored(dataset: Any) -> Iterator[Record]:
    """Rows of a `datasets.Dataset` as stored: images are {"bytes", "path"}, not decoded."""
    for table in dataset.with_format("arrow").iter(batch_size=16):
        yield from _records(table)


@dataclass(frozen=True, kw_only=True)
class ParquetRows(Source):
    """Parquet files. Units are whole row groups; groups too large for that are streamed.

    Attributes:
        files: (file, number of rows of each of its row groups).
    """

    files: tuple[tuple[Path, tuple[int, ...]], ...] = field(repr=False)

    def units(self, first: int, last: int | None) -> Iterator[Unit]:
        """Row groups joined until there are enough rows; a huge group is split like a stream."""
        last = self.count if last is None else last
        assert last is not None
        number, begin, at = 0, first, 0
        for file, groups in self.files:
            for group, rows in enumerate(groups):
                if rows > _ROW_GROUP_ROWS and at < last and at + rows > first:
                    if begin < at:
                        yield Unit(number, begin, at)
                        number += 1
                    for unit in split_into_units(
                        _group_rows(file, [group]), first, last, number, at
                    ):
                        yield unit
                        number = unit.number + 1
                    begin = at + rows
                at += rows
                if at - begin >= UNIT_ROWS and begin < last:
                    yield Unit(number, begin, min(at, last))
                    number, begin = number + 1, at
        if begin < last:
            yield Unit(number, begin, last)

    def rows(self, unit: Unit) -> Iterator[Record]:
        """The unit's rows, from the row groups that contain them."""
        if unit.records is not None:
            yield from unit.records
            return
        at = 0
        for file, groups in self.files:
            for group, rows in enumerate(groups):
                if at < unit.last and at + rows > unit.first:
                    for row, record in enumerate(_group_rows(file, [group]), start=at):
                        if unit.first <= row < unit.last:
                            yield record
                at += rows


def _records(table: Any) -> Iterator[Record]:
    """The rows of an Arrow table or batch; one that Python cannot hold is an `UnreadableRow`."""
    import pyarrow

    # A text that is not UTF-8, a date out of range.
    errors = (ValueError, OverflowError, pyarrow.ArrowException)
    try:
        yield from table.to_pylist()
    except errors:
        for number in range(table.num_rows):
            try:
                yield from table.slice(number, 1).to_pylist()
            except errors as problem:
                yield UnreadableRow("unreadable_row", first_line(problem))


def _group_rows(file: Path, groups: list[int]) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        # Without pre-buffering, which would hold a whole group in memory.
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as reader:
            for batch in reader.iter_batches(batch_size=16, row_groups=groups):
                yield from _records(batch)
    except (pyarrow.ArrowException, OSError) as problem:
        raise DataError(f"'{file}' cannot be read: {first_line(problem)}") from problem


def fingerprint(files: Iterable[Path]) -> str:
    """A hash of names, sizes and times: it changes whenever a file is written, and reads none."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def bounds(source: Source, split: str, limit: int | None) -> tuple[int, int | None]:
    """(first, last) row of `split`, which may have a slice, up to `limit` rows; last is exclusive,
    and None for the end.

    Raises:
        DataError: a slice that cannot be read, is empty, or needs an unknown number of rows.
    """
    from datasets import ReadInstruction

    name, _, slice_text = split.partition("[")
    if source.count is None and slice_text:
        raise DataError(
            f"--split: '{split}' needs the number of rows, which is unknown when streaming; use "
            "--limit instead"
        )
    if source.count is None:
        return 0, limit
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: source.count})
    except (ValueError, AssertionError) as problem:
        raise DataError(
            f"--split: cannot read '{split}'; write it as train, train[:1%] or train[100:200]"
        ) from problem
    if len(parts) != 1:
        raise DataError(f"--split: '{split}' names several splits; give one")
    first, last = parts[0].from_ or 0, source.count if parts[0].to is None else parts[0].to
    if limit is not None:
        last = min(last, first + limit)
    if last <= first:
        raise DataError(f"--split: '{split}' of {ui.count(source.count, 'row')} is empty")
    return first, last
