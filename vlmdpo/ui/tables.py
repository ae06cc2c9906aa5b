"""What takes more than a line on stdout: tables, texts side by side, tokens, images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from vlmdpo.ui.console import escape, out, shows_results, visible


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
    if not shows_results():
        return
    grid = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for i, column in enumerate(columns):
        grid.add_column(escape(column), justify="left" if i in text else "right", overflow="fold")
    for number, row in enumerate(rows):
        grid.add_row(
            *(escape(cell) for cell in row), style="bold green" if number in strong else None
        )
    # Title and note are separate lines: rich would wrap them to the width of a narrow table.
    console = out()
    console.print(f"\n[bold]{escape(title)}[/]")
    console.print(grid)
    if note:
        console.print(escape(note), style="italic")


def columns(title: str, left: tuple[str, str], right: tuple[str, str]) -> None:
    """Two texts side by side on stdout, each (heading, text)."""
    if not shows_results():
        return
    grid = Table(title=escape(title), title_justify="left", title_style="bold", expand=True)
    grid.add_column(escape(left[0]), ratio=1, overflow="fold")
    grid.add_column(escape(right[0]), ratio=1, overflow="fold")
    grid.add_row(escape(left[1]), escape(right[1]))
    out().print(grid)


def tokens(name: str, pieces: Sequence[str], note: str, *, counted: bool) -> None:
    """Decoded tokens on stdout, special ones included: those `counted` in the loss one by one, the
    others as one text.
    """
    if not shows_results():
        return
    console = out()
    text = Text(f"  {visible(name):<9}")
    for number, piece in enumerate(pieces):
        if counted and number:
            text.append("│", style="dim")
        text.append(visible(repr(piece)[1:-1]), style="green" if counted else "dim")
    console.print(text, soft_wrap=True)
    console.print(Text(f"{'':<11}{visible(note)}", style="italic"), soft_wrap=True)


def can_draw_images() -> bool:
    """Whether stdout is a terminal with enough colours for an image."""
    return shows_results() and out().color_system in ("truecolor", "256")


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
    out().print(text, end="")
