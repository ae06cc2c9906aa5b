"""Lines of text: results and `--json` to stdout, messages, warnings and errors to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import rich.markup
from rich.console import Console
from rich.text import Text

_json_only = False  # set by --json: stdout holds one JSON object and nothing else
_muted = False  # set in all processes but the first
_quiet = False  # set by --quiet: no messages and no progress
_answers_yes = False  # set by --yes
_asks = True  # not within a call from Python
_COLUMNS = 80  # the width of warnings and errors
# What a terminal would obey (C0 but tab and line feed, DEL, C1), and what no encoding has.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with its control characters written out, as in \\x1b, so that nothing in data,
    answers or file names moves the cursor, sets a title or hides a line.
    """
    return _CONTROL.sub(_escaped, text.replace("\r\n", "\n"))


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def escape(text: str) -> str:
    """The text as rich prints it as it is: control characters written out, brackets kept."""
    return rich.markup.escape(visible(text))


class _Console(Console):
    """rich's, but a reader that is gone (`| head`) is for the command line to handle: rich would
    exit with status 1.
    """

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def out() -> Console:
    """The console of results."""
    # Created each time, so that a redirected sys.stdout (a test, a notebook) is respected. A pipe
    # has no width; cutting a table at 80 columns there would lose data.
    return _Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)


def err(*, always: bool = False) -> Console:
    """The console of messages; with `always` also where they are muted."""
    console = _Console(file=sys.stderr, highlight=False, quiet=(_muted or _quiet) and not always)
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


@contextlib.contextmanager
def unattended(*, quiet: bool, yes: bool) -> Iterator[None]:
    """Inside, `confirm` does not ask; `quiet` and `yes` as of `set_verbosity`."""
    global _quiet, _answers_yes, _asks
    before = _quiet, _answers_yes, _asks
    _quiet, _answers_yes, _asks = quiet or _quiet, yes, False
    try:
        yield
    finally:
        _quiet, _answers_yes, _asks = before


def is_silent() -> bool:
    """Whether messages are not shown: with --quiet, and in all processes but the first."""
    return err().quiet


def is_terminal() -> bool:
    """Whether stderr is a terminal, where a progress bar can move."""
    return err().is_terminal


def confirm(question: str, *, otherwise: bool = False) -> bool:
    """Ask on a terminal. With --yes the answer is yes; without a terminal, and within a call from
    Python, it is `otherwise`.
    """
    if _answers_yes:
        return True
    if _muted or not _asks or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return otherwise
    sys.stderr.write(f"{visible(question)} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def say(text: str) -> None:
    """A message on stderr. Square brackets are printed as they are."""
    err().print(escape(text), style="dim")


def step(text: str) -> None:
    """The heading of a stage, on stderr."""
    err().print(f"[bold cyan]▸[/] [bold]{escape(text)}[/]")


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
        os.write(2, f"warning: {visible(text)}\n".encode())


def error(text: str) -> None:
    """The error that ends the program, on stderr."""
    _labelled("error:", "bold red", text)


def _labelled(label: str, style: str, text: str) -> None:
    """Print a labelled text in lines of up to 80 columns. A command at its end stays on one line of
    its own, to be copied.
    """
    text = visible(text)
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
    err(always=True).print(shown, soft_wrap=True)


def result(text: str = "") -> None:
    """A line of the result, on stdout."""
    if not _json_only:
        out().print(visible(text), markup=False, soft_wrap=True)


def piece(text: str) -> None:
    """A part of a line of the result, at once."""
    if not _json_only:
        sys.stdout.write(visible(text))
        sys.stdout.flush()


def is_live() -> bool:
    """Whether results are seen as they are printed."""
    return not _json_only and sys.stdout.isatty()


def shows_results() -> bool:
    """Whether results are printed as text: not with --json."""
    return not _json_only


def raw(text: str) -> None:
    """A line on stdout in every mode, for output that is data."""
    if not _muted:
        sys.stdout.write(visible(text) + "\n")


def json_result(report: dict[str, Any]) -> None:
    """The one JSON object of a `--json` run."""
    text = json.dumps(report, indent=2, ensure_ascii=False, default=str)
    raw(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def count(number: float, noun: str, plural: str | None = None) -> str:
    """A number and what is counted: "1 row", "2,000 rows".

    Args:
        noun: in the singular.
        plural: where it is not the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def human_bytes(count: float) -> str:
    """Bytes in decimal units (1 GB is 1e9 bytes), with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
