"""Several sources as one: their units in a row, and how often each source's rows are taken."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlmdpo.data.schemas import Schema
from vlmdpo.data.sources import Record, Source, Unit


@dataclass(frozen=True, kw_only=True)
class Part:
    """One source of a mixture.

    Attributes:
        source: where its rows are.
        schema: what its rows hold.
        first, last: its first row, and the one behind its last; None for the end.
        weight: how often its usable rows are taken: 0.5 for a random half, 2 for each twice.
        name: what messages call it before a row's number; "" if there is no other.
    """

    source: Source
    schema: Schema
    first: int
    last: int | None
    weight: float = 1.0
    name: str = ""

    def row(self, number: int) -> str:
        """What messages call a row."""
        return f"{self.name} row {number}".strip()

    @property
    def count(self) -> int | None:
        """Rows that are read, or None if only reading tells."""
        return None if self.last is None else self.last - self.first


@dataclass(frozen=True)
class Mixture:
    """The sources of one preparation, in order. A row's number counts on over all of them."""

    parts: tuple[Part, ...]

    def units(self) -> Iterator[Unit]:
        """The units of all parts, the same at every call."""
        number = offset = 0
        for at, part in enumerate(self.parts):
            last = part.first
            for unit in part.source.units(part.first, part.last):
                last = unit.last
                # A part's own row numbers start at 0; with one part they are kept as they are.
                yield replace(unit, number=number, part=at, offset=offset)
                number += 1
            offset += last

    def rows(self, unit: Unit) -> Iterator[Record]:
        """The rows of a unit."""
        return self.parts[unit.part].source.rows(unit)

    @property
    def count(self) -> int | None:
        """Rows that are read, or None if only reading tells."""
        counts = [part.count for part in self.parts]
        return None if None in counts else sum(count for count in counts if count is not None)


def copies(weights: Sequence[float], parts: Sequence[int], seed: int) -> list[int]:
    """How often each row is taken.

    Args:
        weights: of each part.
        parts: the part of each row.
        seed: of the rows that a share takes.
    """
    taken = [0] * len(parts)
    for part, weight in enumerate(weights):
        rows = [row for row, own in enumerate(parts) if own == part]
        whole, share = int(weight), weight - int(weight)
        chosen = random.Random(f"{seed}/{part}").sample(rows, round(share * len(rows)))
        for row in rows:
            taken[row] += whole
        for row in chosen:
            taken[row] += 1
    return taken


def summary(parts: Sequence[Part], counts: Sequence[dict[str, int]]) -> list[dict[str, Any]]:
    """Each source as the manifest lists it.

    Args:
        counts: of each part: rows_in, usable, rows_out.
    """
    return [
        {
            "dataset": part.source.name,
            "schema": part.schema.line,
            "mix": part.weight,
            **own,
        }
        for part, own in zip(parts, counts, strict=True)
    ]
