"""Cases that are measured one after the other, each shown and kept when it is done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

Case = dict[str, Any]


def measure_each(
    cases: Iterable[Callable[[], Case]],
    *,
    show: Callable[[Case], RenderableType],
    markdown: Path | None,
    report: Callable[[list[Case]], str],
) -> list[Case]:
    """Measure all cases; Ctrl-C keeps those that are done.

    Args:
        cases: each measures one.
        show: a line or table about a case, for stderr: stdout is for the result, or for `--json`.
        markdown: where the report is written after each case; None for nowhere.
        report: the text of the report.
    """
    console, done = Console(stderr=True), []
    with contextlib.suppress(KeyboardInterrupt):
        for measure in cases:
            done.append(measure())
            console.print(show(done[-1]), markup=False, highlight=False)
            if markdown:
                markdown.write_text(report(done), encoding="utf-8")
    return done
