"""Progress of long work on stderr: bars, and the dashboard of a training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from vlmdpo.ui.console import err, escape, say


class Bar:
    """A progress bar; `advance` moves it and may change the text after it."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self, by: int = 1, note: str | None = None) -> None:
        fields: dict[str, Any] = {} if note is None else {"note": escape(note)}
        self._progress.update(self._task, advance=by, **fields)


class _Rate(ProgressColumn):
    """The speed, in units per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """The recent speed, or the average once it is done."""
        speed = (
            task.finished_speed
            or task.speed
            or (task.completed / task.elapsed if task.completed and task.elapsed else 0)
        )
        return Text(f"{speed:.1f} {self._unit}/s" if speed else "")


@contextmanager
def progress(what: str, total: int | None, *, unit: str = "") -> Iterator[Bar]:
    """A progress bar on stderr: count, elapsed and remaining time, and with `unit` the speed."""
    live = Progress(
        TextColumn("  {task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        *([_Rate(unit)] if unit else []),
        TextColumn("{task.fields[note]}"),
        console=err(),
    )
    with live:
        yield Bar(live, live.add_task(escape(what), total=total, note=""))


@dataclass(frozen=True)
class Figure:
    """One line of a dashboard.

    Attributes:
        label, text: the name, and the latest value as text.
        history: earlier values, for the sparkline.
        template: how `text` is phrased in a plain line; "" for label and text.
    """

    label: str
    text: str
    history: Sequence[float] = ()
    template: str = ""


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """The last values as a row of bars, scaled between their minimum and maximum."""
    shown = [value for value in values if math.isfinite(value)][-width:]
    low, high = (min(shown), max(shown)) if shown else (0.0, 0.0)
    if low == high:
        return "▁" * len(shown)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / (high - low))] for value in shown)


class Dashboard:
    """A live view of a run: a fixed panel on a terminal, otherwise plain lines."""

    def __init__(self, what: str, total: int, done: int, console: Console) -> None:
        self._total, self._console, self._done = total, console, done
        self._speed, self._left = 0.0, ""
        self._shown: Sequence[Figure] = ()
        self._bar = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            auto_refresh=False,
        )
        self._task = self._bar.add_task(escape(what), total=total, completed=done, note="")

    def step(self, done: int, pairs_per_s: float, left_s: float | None) -> None:
        """Show `done` steps, the speed, and the remaining seconds (None if unknown)."""
        self._done, self._speed = done, pairs_per_s
        self._left = "" if left_s is None else f", {timedelta(seconds=round(left_s))} left"
        note = f"{pairs_per_s:.1f} pairs/s{self._left}" if pairs_per_s else ""
        self._bar.update(self._task, completed=done, note=note)

    def figures(self, figures: Sequence[Figure], *, evaluated: bool = False) -> None:
        """Show new values; with `evaluated` those of an evaluation, which have a `template`."""
        self._shown = figures
        if self._console.is_terminal:
            return
        phrases = [
            f.template.format(f.text) if f.template else f"{f.label} {f.text}"
            for f in figures
            if bool(f.template) == evaluated
        ]
        speed = f"; {self._speed:.1f} pairs/s{self._left}" if self._speed and not evaluated else ""
        say(f"step {self._done}/{self._total}: {', '.join(phrases)}{speed}")

    def __rich__(self) -> Group:
        grid = Table.grid(padding=(0, 2))
        for figure in self._shown:
            grid.add_row(
                f"  [dim]{escape(figure.label)}[/]",
                f"[cyan]{sparkline(figure.history)}[/]",
                escape(figure.text),
            )
        return Group(self._bar, grid)


@contextmanager
def dashboard(what: str, total: int, done: int = 0) -> Iterator[Dashboard]:
    """A `Dashboard` on stderr, whose last state stays visible."""
    console = err()
    board = Dashboard(what, total, done, console)
    if not console.is_terminal or console.quiet:
        yield board
        return
    with Live(board, console=console, refresh_per_second=4, vertical_overflow="visible"):
        yield board
