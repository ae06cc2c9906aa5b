"""The rows that a command left out, by reason. For the exceptions see `reasons`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vlmdpo.data.reasons import BadRow

_NAMED_ROWS = 5


@dataclass
class LeftOut:
    """The rows that were left out, by reason: each row's name and the detail."""

    by_reason: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, row: str, problem: BadRow) -> None:
        """Count a row."""
        self.by_reason.setdefault(problem.reason, []).append((row, str(problem)))

    @classmethod
    def joined(cls, several: Iterable[LeftOut]) -> LeftOut:
        """The rows of all of these."""
        joined = cls()
        for one in several:
            for reason, rows in one.by_reason.items():
                joined.by_reason.setdefault(reason, []).extend(rows)
        return joined

    def __len__(self) -> int:
        return sum(map(len, self.by_reason.values()))

    def report(self) -> dict[str, Any]:
        """By reason: how many, and each row with its detail."""
        return {
            reason: {"count": len(rows), "rows": [{"row": r, "detail": d} for r, d in rows]}
            for reason, rows in sorted(self.by_reason.items())
        }


def in_words(report: dict[str, Any]) -> str:
    """`LeftOut.report` in a line, with the first rows of each reason."""
    return "; ".join(
        f"{reason}: {found['count']:,} ({_named(found['rows'])}): {found['rows'][0]['detail']}"
        for reason, found in report.items()
    )


def _named(rows: list[dict[str, str]]) -> str:
    named = ", ".join(entry["row"] for entry in rows[:_NAMED_ROWS])
    return f"{named} and {len(rows) - _NAMED_ROWS:,} more" if len(rows) > _NAMED_ROWS else named
