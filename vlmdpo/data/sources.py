"""Where rows come from: files, saved datasets and the Hub, cut into units of work that any process
can read alone.

A source knows nothing of what its columns mean (see `schemas`). Where a format can be entered
anywhere, a unit says only which rows; where it can only be streamed, the unit brings its rows
along.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmdpo.errors import DataError

Record = dict[str, Any]
UNIT_ROWS = 256  # rows of a unit of work, which is also what a killed run has to do again
_UNIT_BYTES = 32_000_000  # of a streamed unit: it travels to another process
_ROW_GROUP_ROWS = (
    2_000  # a larger Parquet row group is streamed: entering it costs reading it from its start
)


@dataclass(frozen=True)
class Unit:
    """Rows `first` up to `last` (exclusive) of a source; `records` where they had to be streamed."""

    number: int
    first: int
    last: int
    records: list[Record] | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """A readable source.

    Attributes:
        name: as the user knows it.
        fingerprint: changes whenever the content does.
        count: rows, or None where only reading tells.
        root: where paths of pictures start.
        columns: what is known of them without reading a row.
    """

    name: str
    fingerprint: str
    count: int | None
    root: Path
    columns: tuple[str, ...] = ()

    def units(self, first: int, last: int | None) -> Iterator[Unit]:
        """Rows `first` to `last` in units, the same ones at every call."""
        raise NotImplementedError

    def rows(self, unit: Unit) -> Iterator[Record]:
        """The rows of a unit."""
        raise NotImplementedError

    def first_row(self) -> Record:
        """Any one row, to recognise the schema by. Raises DataError where there is none."""
        for unit in self.units(0, 1):
            for row in self.rows(unit):
                return row
        raise DataError(f"'{self.name}' holds no row")


@dataclass(frozen=True, kw_only=True)
class Streamed(Source):
    """A source that is read from its beginning: text files, archives, the Hub's streams.

    Attributes:
        stream: opens it anew and yields its rows.
    """

    stream: Callable[[], Iterable[Record]] = field(repr=False)

    def units(self, first: int, last: int | None) -> Iterator[Unit]:
        """Rows in order, cut where a unit has enough rows or bytes."""
        return cut(self.stream(), first, last)

    def rows(self, unit: Unit) -> Iterator[Record]:
        """The rows that the unit brought along."""
        assert unit.records is not None
        return iter(unit.records)

    def __getstate__(self) -> dict[str, Any]:
        # Only the parent streams; what opens the stream (a closure, a connection) stays there.
        return {**self.__dict__, "stream": None}


def cut(
    rows: Iterable[Record], first: int, last: int | None, number: int = 0, start: int = 0
) -> Iterator[Unit]:
    """Units of rows `first` to `last` of a stream whose first row is number `start`; unit numbers
    begin at `number`.
    """
    held: list[Record] = []
    size, begin = 0, max(first, start)
    for at, row in enumerate(rows, start=start):
        if last is not None and at >= last:
            break
        if at < first:
            continue
        held.append(row)
        size += _payload(row)
        if len(held) == UNIT_ROWS or size >= _UNIT_BYTES:
            yield Unit(number, begin, at + 1, held)
            number, begin, held, size = number + 1, at + 1, [], 0
    if held:
        yield Unit(number, begin, begin + len(held), held)


def _payload(value: Any) -> int:
    if isinstance(value, (bytes, str)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_payload, value.values()))
    return sum(map(_payload, value)) if isinstance(value, (list, tuple)) else 8


@dataclass(frozen=True, kw_only=True)
class ArrowRows(Source):
    """A `datasets.Dataset` on disk; pickling it sends file names, not rows."""

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
    """Rows of a `datasets.Dataset` as they lie on disk: pictures as {"bytes", "path"}, nothing
    decoded or cast.
    """
    for table in dataset.with_format("arrow").iter(batch_size=16):
        yield from table.to_pylist()


@dataclass(frozen=True, kw_only=True)
class ParquetRows(Source):
    """Parquet files. Units are whole row groups; groups too large for that are streamed."""

    files: tuple[tuple[Path, tuple[int, ...]], ...] = field(
        repr=False
    )  # each file with the rows of its row groups

    def units(self, first: int, last: int | None) -> Iterator[Unit]:
        """Row groups together until there are enough rows; a huge group cut as a stream is."""
        last = self.count if last is None else last
        assert last is not None
        number, begin, at = 0, first, 0
        for file, groups in self.files:
            for group, rows in enumerate(groups):
                if rows > _ROW_GROUP_ROWS and at < last and at + rows > first:
                    if begin < at:
                        yield Unit(number, begin, at)
                        number += 1
                    for unit in cut(_batches(file, [group]), first, last, number, at):
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
        """The rows of the unit's row groups that are in it."""
        if unit.records is not None:
            yield from unit.records
            return
        at = 0
        for file, groups in self.files:
            for group, rows in enumerate(groups):
                if at < unit.last and at + rows > unit.first:
                    for row, record in enumerate(_batches(file, [group]), start=at):
                        if unit.first <= row < unit.last:
                            yield record
                at += rows


def _batches(file: Path, groups: list[int]) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(
            file, pre_buffer=False, buffer_size=1 << 20
        ) as reader:  # else a whole group is in memory
            for batch in reader.iter_batches(batch_size=16, row_groups=groups):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as problem:
        raise DataError(f"'{file}' cannot be read: {str(problem).splitlines()[0]}") from problem


def fingerprint(files: Iterable[Path]) -> str:
    """Names, sizes and times of files: changes whenever one is written, and costs no reading."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def bounds(source: Source, split: str, limit: int | None) -> tuple[int, int | None]:
    """First and last row (exclusive) of `split`, which may hold a slice, cut to `limit` rows; None
    is to the end.

    Raises:
        DataError: a slice that cannot be read, selects nothing, or is in per cent of an unknown
            number of rows.
    """
    from datasets import ReadInstruction

    name, _, cut_at = split.partition("[")
    if source.count is None and cut_at:
        raise DataError(
            f"--split: '{split}' needs the number of rows, which streaming does not tell; give "
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
        raise DataError(f"--split: '{split}' of {source.count} rows is empty")
    return first, last
