"""From the exception that one row caused to the reason that the row is counted by.

A row that cannot be used is left out and counted; it never ends the call. Other exceptions are bugs
of ours, and keep their tracebacks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vlmdpo.data.images import BadImage
from vlmdpo.data.pairs import BadRow

MAX_DETAIL = 200  # characters of a detail
_NAMED_ROWS = 5
# What Pillow, tokenizers and processors raise for one row's content. ValueError includes
# CannotRender and UnicodeError.
ROW_ERRORS = (BadRow, BadImage, ValueError, OSError, SyntaxError, struct.error, RecursionError)


def reason_of(problem: BaseException, otherwise: str) -> tuple[str, str]:
    """(reason, detail) of one of ROW_ERRORS.

    Args:
        otherwise: the reason where the exception names none.
    """
    named = getattr(problem, "reason", None)
    reason = named if isinstance(problem, (BadRow, BadImage)) or named else otherwise
    text = " ".join(str(problem).split()) or type(problem).__name__
    return str(reason), text if len(text) <= MAX_DETAIL else f"{text[: MAX_DETAIL - 1]}…"


@dataclass
class LeftOut:
    """The rows that were left out, by reason: each row's name and the detail."""

    by_reason: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, row: str, problem: BaseException, otherwise: str) -> None:
        """Count a row. For `otherwise` see `reason_of`."""
        reason, detail = reason_of(problem, otherwise)
        self.by_reason.setdefault(reason, []).append((row, detail))

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


def lines(report: dict[str, Any]) -> Iterable[str]:
    """A line for each reason of `LeftOut.report`, with the first rows."""
    for reason, found in report.items():
        rows = [entry["row"] for entry in found["rows"]]
        more = f" and {len(rows) - _NAMED_ROWS:,} more" if len(rows) > _NAMED_ROWS else ""
        named = ", ".join(rows[:_NAMED_ROWS])
        yield f"{reason}: {found['count']:,} ({named}{more}): {found['rows'][0]['detail']}"
