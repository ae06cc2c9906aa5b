"""The only module that prints: results and `--json` to stdout, everything else to stderr."""

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

_json_only = False  # set by --json: stdout holds one JSON object and nothing else
_muted = False  # set in all processes but the first
_quiet = False  # set by --quiet: no messages and no progress
_answers_yes = False  # set by --yes
_COLUMNS = 80  # the width of warnings and errors


def _out() -> Console:
    # Created each time, so that a redirected sys.stdout (a test, a notebook) is respected. A pipe
    # has no width; cutting a table at 80 columns there would lose data.
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)


def _err(*, always: bool = False) -> Console:
    console = Console(file=sys.stderr, highlight=False, quiet=(_muted or _quiet) and not always)
    console.soft_wrap = not console.is_terminal  # a log keeps each message on one line
    return console


def mute() -> None:
    """Print only errors from now on: for every process of a run but the first."""
    global _json_only, _muted
    _json_only = _muted = True


def set_json_only(json_only: bool) -> None:
    """If set, `table` and `result` print nothing: the JSON object is the only result."""
    global _json_only
    _json_only = json_only


def set_verbosity(*, quiet: bool, yes: bool) -> None:
    """`quiet`: no messages and no progress, only results, warnings and errors. `yes`: `confirm`
    does not ask.
    """
    global _quiet, _answers_yes
    _quiet, _answers_yes = quiet, yes


def is_silent() -> bool:
    """Whether messages are not shown: with --quiet, and in all processes but the first."""
    return _err().quiet


def is_terminal() -> bool:
    """Whether stderr is a terminal, where a progress bar can move."""
    return _err().is_terminal


def confirm(question: str, *, otherwise: bool = False) -> bool:
    """Ask on a terminal. With --yes the answer is yes; without a terminal it is `otherwise`."""
    if _answers_yes:
        return True
    if _muted or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return otherwise
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def say(text: str) -> None:
    """A message on stderr. Square brackets are printed as they are."""
    _err().print(escape(text), style="dim")


def step(text: str) -> None:
    """The heading of a stage, on stderr."""
    _err().print(f"[bold cyan]▸[/] [bold]{escape(text)}[/]")


def warn(text: str) -> None:
    """A warning on stderr, also with --quiet."""
    if not _muted:
        _labelled("warning:", "yellow", text)


def warn_from_handler(text: str) -> None:
    """`warn` for a signal handler. It may interrupt the writing of a line, and entering the stream
    a second time raises RuntimeError; then this writes to the file descriptor.
    """
    try:
        warn(text)
    except RuntimeError:
        os.write(2, f"warning: {text}\n".encode())


def error(text: str) -> None:
    """The error that ends the program, on stderr."""
    _labelled("error:", "bold red", text)


def _labelled(label: str, style: str, text: str) -> None:
    """Print a labelled text in lines of up to 80 columns. A command at its end stays on one line of
    its own, to be copied.
    """
    indent = " " * (len(label) + 1)
    sentence, command = text, ""
    found = re.search(r"(?<=: )vlmdpo [^;]+$", text)
    if found and len(indent + text) > _COLUMNS:
        sentence, command = text[: found.start()].rstrip(), found[0]
    lines = textwrap.wrap(
        sentence, _COLUMNS - len(indent), break_long_words=False, break_on_hyphens=False
    ) or [""]
    shown = Text.assemble(
        (label, style), " ", f"\n{indent}".join([*lines, *([command] if command else [])])
    )
    _err(always=True).print(shown, soft_wrap=True)


def result(text: str = "") -> None:
    """A line of the result, on stdout."""
    if not _json_only:
        _out().print(text, markup=False, soft_wrap=True)


def raw(text: str) -> None:
    """A line on stdout in every mode, for output that is data."""
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
    """A table on stdout.

    Args:
        strong: numbers of rows to highlight.
        note: a line below the table.
        text: numbers of columns with text, which are aligned left; the others hold numbers.
    """
    if _json_only:
        return
    grid = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for i, column in enumerate(columns):
        grid.add_column(escape(column), justify="left" if i in text else "right", overflow="fold")
    for number, row in enumerate(rows):
        grid.add_row(
            *(escape(cell) for cell in row), style="bold green" if number in strong else None
        )
    # Title and note are separate lines: rich would wrap them to the width of a narrow table.
    out = _out()
    out.print(f"\n[bold]{escape(title)}[/]")
    out.print(grid)
    if note:
        out.print(escape(note), style="italic")


def columns(title: str, left: tuple[str, str], right: tuple[str, str]) -> None:
    """Two texts side by side on stdout, each (heading, text)."""
    if _json_only:
        return
    grid = Table(title=escape(title), title_justify="left", title_style="bold", expand=True)
    grid.add_column(escape(left[0]), ratio=1, overflow="fold")
    grid.add_column(escape(right[0]), ratio=1, overflow="fold")
    grid.add_row(escape(left[1]), escape(right[1]))
    _out().print(grid)


def tokens(name: str, pieces: Sequence[str], note: str, *, counted: bool) -> None:
    """Decoded tokens on stdout, special ones included: those `counted` in the loss one by one, the
    others as one text.
    """
    if _json_only:
        return
    out = _out()
    text = Text(f"  {name:<9}")
    for number, piece in enumerate(pieces):
        if counted and number:
            text.append("│", style="dim")
        text.append(repr(piece)[1:-1], style="green" if counted else "dim")
    out.print(text, soft_wrap=True)
    out.print(Text(f"{'':<11}{note}", style="italic"), soft_wrap=True)


def can_draw_images() -> bool:
    """Whether stdout is a terminal with enough colours for an image."""
    return not _json_only and _out().color_system in ("truecolor", "256")


def image(image: Any, *, columns: int = 48) -> None:
    """A PIL image on stdout as coloured half blocks, two pixels per character."""
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
        console=_err(),
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
    console = _err()
    board = Dashboard(what, total, done, console)
    if not console.is_terminal or console.quiet:
        yield board
        return
    with Live(board, console=console, refresh_per_second=4, vertical_overflow="visible"):
        yield board


def human_bytes(count: float) -> str:
    """Bytes in decimal units (1 GB is 1e9 bytes), with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
