"""The only room that prints. Results and `--json` go to stdout; talk, warnings and progress to
stderr.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
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

_quiet = False  # set by --json: then stdout holds one JSON object and nothing else
_muted = False  # set in all processes but the first
_silent = False  # set by --quiet: no talk and no progress
_yes = False  # set by --yes: what would be asked is answered
_COLUMNS = 80  # that warnings and errors keep within


def _out() -> Console:
    # Made anew each time, so that a redirected sys.stdout (a test, a notebook) is honoured. A pipe
    # has no width of its own; cutting a table at 80 columns there would lose data.
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)


def _err(*, always: bool = False) -> Console:
    console = Console(file=sys.stderr, highlight=False, quiet=(_muted or _silent) and not always)
    console.soft_wrap = (
        not console.is_terminal
    )  # a terminal's lines end between words, a log's with the sentence
    return console


def mute() -> None:
    """Print nothing but errors any more: for every process of a distributed run but the first."""
    global _quiet, _muted
    _quiet = _muted = True


def set_quiet(quiet: bool) -> None:
    """With `quiet`, `table` and `result` print nothing: the JSON object is the only result."""
    global _quiet
    _quiet = quiet


def set_manners(*, quiet: bool, yes: bool) -> None:
    """`quiet`: no talk and no progress, but results, warnings and errors. `yes`: questions are
    answered, not asked.
    """
    global _silent, _yes
    _silent, _yes = quiet, yes


def confirm(question: str, *, otherwise: bool = False) -> bool:
    """Ask on a terminal; with --yes the answer is yes, and where nobody can be asked it is
    `otherwise`.
    """
    if _yes:
        return True
    if _muted or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return otherwise
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def say(text: str) -> None:
    """A line of talk on stderr. Text is taken as it is: square brackets in it are no markup."""
    _err().print(escape(text), style="dim")


def step(text: str) -> None:
    """The heading of a stage of work, on stderr."""
    _err().print(f"[bold cyan]▸[/] [bold]{escape(text)}[/]")


def warn(text: str) -> None:
    """Something that the user should know of, on stderr, --quiet or not."""
    if not _muted:
        _told("warning:", "yellow", text)


def warn_from_handler(text: str) -> None:
    """`warn` for a signal handler, which may interrupt the writing of a line: a stream cannot be
    entered twice, and says so by a RuntimeError; then this goes past it.
    """
    try:
        warn(text)
    except RuntimeError:
        os.write(2, f"warning: {text}\n".encode())


def error(text: str) -> None:
    """What ends the program, on stderr."""
    _told("error:", "bold red", text)


def _told(label: str, style: str, text: str) -> None:
    """A labelled text in lines of 80 columns or fewer. A command at its end gets a line of its own,
    whole, to be copied.
    """
    indent = " " * (len(label) + 1)
    whole, command = text, ""
    found = re.search(r"(?<=: )vlmdpo [^;]+$", text)
    if found and len(indent + text) > _COLUMNS:
        whole, command = text[: found.start()].rstrip(), found[0]
    lines = textwrap.wrap(
        whole, _COLUMNS - len(indent), break_long_words=False, break_on_hyphens=False
    ) or [""]
    shown = Text.assemble(
        (label, style), " ", f"\n{indent}".join([*lines, *([command] if command else [])])
    )
    _err(always=True).print(shown, soft_wrap=True)


def result(text: str = "") -> None:
    """A line of result on stdout."""
    if not _quiet:
        _out().print(text, markup=False, soft_wrap=True)


def raw(text: str) -> None:
    """A line of result whatever the mode: for output that is data itself."""
    if not _muted:
        sys.stdout.write(text + "\n")


def json_result(report: dict[str, Any]) -> None:
    """The one JSON object of a `--json` run."""
    raw(json.dumps(report, indent=2, ensure_ascii=False, default=str))


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    strong: Sequence[int] = (),
    note: str = "",
    text: Sequence[int] = (0,),
) -> None:
    """A table on stdout. Columns in `text` are text, the others numbers; rows numbered in `strong`
    stand out.
    """
    if _quiet:
        return
    grid = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for i, column in enumerate(columns):
        grid.add_column(escape(column), justify="left" if i in text else "right", overflow="fold")
    for number, row in enumerate(rows):
        grid.add_row(
            *(escape(cell) for cell in row), style="bold green" if number in strong else None
        )
    # Title and note are lines of their own: rich would fold them at the width of a narrow table.
    out = _out()
    out.print(f"\n[bold]{escape(title)}[/]")
    out.print(grid)
    if note:
        out.print(escape(note), style="italic")


def columns(title: str, left: tuple[str, str], right: tuple[str, str]) -> None:
    """Two texts side by side on stdout, each (heading, text)."""
    if _quiet:
        return
    grid = Table(title=escape(title), title_justify="left", title_style="bold", expand=True)
    grid.add_column(escape(left[0]), ratio=1, overflow="fold")
    grid.add_column(escape(right[0]), ratio=1, overflow="fold")
    grid.add_row(escape(left[1]), escape(right[1]))
    _out().print(grid)


def tokens(name: str, pieces: Sequence[str], note: str, *, counted: bool) -> None:
    """Decoded tokens on stdout with their special ones visible: those `counted` in the loss one by
    one, others as one text.
    """
    if _quiet:
        return
    out = _out()
    text = Text(f"  {name:<9}")
    for number, piece in enumerate(pieces):
        if counted and number:
            text.append("│", style="dim")
        text.append(repr(piece)[1:-1], style="green" if counted else "dim")
    out.print(text, soft_wrap=True)
    out.print(Text(f"{'':<11}{note}", style="italic"), soft_wrap=True)


def draws_pictures() -> bool:
    """Whether stdout is a terminal with the colours that a picture needs."""
    return not _quiet and _out().color_system in ("truecolor", "256")


def picture(image: Any, *, columns: int = 48) -> None:
    """A PIL picture on stdout as coloured half blocks, two pixels to a character."""
    width, height = image.size
    columns = min(columns, width)
    rows = max(1, round(height / width * columns / 2))
    small = image.convert("RGB").resize((columns, 2 * rows))
    text = Text()
    for y in range(0, 2 * rows, 2):
        text.append("  ")
        for x in range(columns):
            upper, lower = (
                "rgb({},{},{})".format(*small.getpixel((x, y + below))) for below in (0, 1)
            )
            text.append("▀", style=f"{upper} on {lower}")
        text.append("\n")
    _out().print(text, end="")


class Bar:
    """A running progress bar; `advance` moves it and may change the text behind it."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self, by: int = 1, note: str | None = None) -> None:
        fields: dict[str, Any] = {} if note is None else {"note": escape(note)}
        self._progress.update(self._task, advance=by, **fields)


class _Rate(ProgressColumn):
    """How many a second, in the unit's own name."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """The speed of the last half minute, or of the whole once it is done."""
        speed = (
            task.finished_speed
            or task.speed
            or (task.completed / task.elapsed if task.completed and task.elapsed else 0)
        )
        return Text(f"{speed:.1f} {self._unit}/s" if speed else "")


@contextmanager
def progress(what: str, total: int | None, *, unit: str = "") -> Iterator[Bar]:
    """A progress bar on stderr with count, time gone and left, with `unit` the speed; a plain line
    where it is no terminal.
    """
    live = Progress(
        TextColumn("  {task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        *([_Rate(unit)] if unit else []),
        TextColumn("{task.fields[note]}"),
        console=_err(),
    )
    with live:
        yield Bar(live, live.add_task(escape(what), total=total, note=""))


@dataclass(frozen=True)
class Figure:
    """One line of a dashboard: a label, the value as text, and the values that led there. `talk`
    frames the text where it is printed as a plain line; figures without it are printed as label and
    text.
    """

    label: str
    text: str
    history: Sequence[float] = ()
    talk: str = ""


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """The last values as a row of bars, from the lowest to the highest of them."""
    shown = [value for value in values if math.isfinite(value)][-width:]
    low, high = (min(shown), max(shown)) if shown else (0.0, 0.0)
    if low == high:
        return "▁" * len(shown)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / (high - low))] for value in shown)


class Dashboard:
    """A run as it goes: where stderr is a terminal a panel that stays in its place, else a plain
    line for each figure.
    """

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
        """So many steps are done, at this speed, with so many seconds to go."""
        self._done, self._speed = done, pairs_per_s
        self._left = "" if left_s is None else f", {timedelta(seconds=round(left_s))} left"
        note = f"{pairs_per_s:.1f} pairs/s{self._left}" if pairs_per_s else ""
        self._bar.update(self._task, completed=done, note=note)

    def figures(self, figures: Sequence[Figure], *, evaluated: bool = False) -> None:
        """New values. `evaluated`: they are of an evaluation, whose figures are those with `talk`."""
        self._shown = figures
        if self._console.is_terminal:
            return
        spoken = [
            f.talk.format(f.text) if f.talk else f"{f.label} {f.text}"
            for f in figures
            if bool(f.talk) == evaluated
        ]
        speed = f"; {self._speed:.1f} pairs/s{self._left}" if self._speed and not evaluated else ""
        say(f"step {self._done}/{self._total}: {', '.join(spoken)}{speed}")

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
    """A `Dashboard` on stderr; its last state stays when it ends."""
    console = _err()
    board = Dashboard(what, total, done, console)
    if not console.is_terminal or console.quiet:
        yield board
        return
    with Live(board, console=console, refresh_per_second=4, vertical_overflow="visible"):
        yield board


def human_bytes(count: float) -> str:
    """Bytes in decimal units (1 GB is 1e9 bytes), three digits or so."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
