"""The only room that prints. Results and `--json` go to stdout; talk, warnings and progress to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
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


def _out() -> Console:
    # Made anew each time, so that a redirected sys.stdout (a test, a notebook) is honoured. A pipe has no width
    # of its own; cutting a table at 80 columns there would lose data.
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)


def _err(*, always: bool = False) -> Console:
    return Console(file=sys.stderr, highlight=False, soft_wrap=True, quiet=_muted and not always)


def mute() -> None:
    """Print nothing but errors any more: for every process of a distributed run but the first."""
    global _quiet, _muted
    _quiet = _muted = True


def set_quiet(quiet: bool) -> None:
    """With `quiet`, `table` and `result` print nothing: the JSON object is the only result."""
    global _quiet
    _quiet = quiet


def say(text: str) -> None:
    """A line of talk on stderr. Text is taken as it is: square brackets in it are no markup."""
    _err().print(escape(text), style="dim")


def step(text: str) -> None:
    """The heading of a stage of work, on stderr."""
    _err().print(f"[bold cyan]▸[/] [bold]{escape(text)}[/]")


def warn(text: str) -> None:
    _err().print(f"[yellow]warning:[/] {escape(text)}")


def error(text: str) -> None:
    _err(always=True).print(f"[bold red]error:[/] {escape(text)}")


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
    """A table on stdout. Columns in `text` are text, the others numbers; rows numbered in `strong` stand out."""
    if _quiet:
        return
    grid = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for i, column in enumerate(columns):
        grid.add_column(escape(column), justify="left" if i in text else "right", overflow="fold")
    for number, row in enumerate(rows):
        grid.add_row(*(escape(cell) for cell in row), style="bold green" if number in strong else None)
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
    """Decoded tokens on stdout with their special ones visible: those `counted` in the loss one by one, others as one text."""
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
            upper, lower = ("rgb({},{},{})".format(*small.getpixel((x, y + below))) for below in (0, 1))
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
        speed = task.finished_speed or task.speed or (task.completed / task.elapsed if task.completed and task.elapsed else 0)
        return Text(f"{speed:.1f} {self._unit}/s" if speed else "")


@contextmanager
def progress(what: str, total: int | None, *, unit: str = "") -> Iterator[Bar]:
    """A progress bar on stderr with count, time gone and left, with `unit` the speed; a plain line where it is no terminal."""
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


def human_bytes(count: float) -> str:
    """Bytes in decimal units (1 GB is 1e9 bytes), three digits or so."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
