"""Why a row cannot be used: the reasons that rows are counted by, and their messages.

Our own code raises `BadRow` or `BadImage` where it reads what a row holds. Libraries that are given
a row's content (Pillow, a chat template, a model's processor) may raise anything: `foreign` turns
that into a reason. Any other exception is a bug, and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmdpo.errors import VlmDpoError, is_out_of_memory

SHOWN = 80  # characters of a cell that a message shows at most
_MESSAGE = 400  # characters of a whole message
_PACKAGE = Path(__file__).resolve().parent.parent
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = SHOWN
_ADDRESS = re.compile(r" (?:object )?at 0x[0-9a-fA-F]+")


class BadRow(Exception):
    """Why a row cannot be used: `reason` is the name it is counted by, the text says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(_tidy(detail))
        self.reason = reason


class BadImage(BadRow):
    """Why an image cannot be used."""


def _tidy(detail: str) -> str:
    """A message in one line of bounded length, without addresses, which differ between runs."""
    text = " ".join(_ADDRESS.sub("", detail).split())
    return text if len(text) <= _MESSAGE else text[: _MESSAGE - 1] + "…"


def shown(cell: Any) -> str:
    """A cell in quotes, as messages show it: its beginning, control characters escaped."""
    if isinstance(cell, (str, bytes)):
        return repr(cell[:SHOWN]) + ("…" if len(cell) > SHOWN else "")
    text = _REPR.repr(cell)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def first_line(problem: BaseException) -> str:
    """The first line of an exception's message; its type where it has none."""
    return next(
        (line for line in str(problem).splitlines() if line.strip()), type(problem).__name__
    )


def missing(cell: Any) -> bool:
    """Whether a cell holds nothing: None, or NaN, which is how pandas writes it."""
    return cell is None or (isinstance(cell, float) and cell != cell)


@contextlib.contextmanager
def foreign(kind: type[BadRow], reason: str, about: str = "") -> Iterator[None]:
    """Inside, whatever a library raises about a row's content becomes `kind` with `reason`.

    Errors of the user, a lack of memory, and exceptions that our own code raises pass unchanged.

    Args:
        about: what the message begins with.
    """
    try:
        yield
    except (BadRow, VlmDpoError):
        raise
    except Exception as problem:
        if is_out_of_memory(problem) or _is_ours(problem):
            raise
        raise kind(reason, about + first_line(problem)) from problem


def _is_ours(problem: BaseException) -> bool:
    """Whether an exception was raised by a line of this package, not by a library it calls."""
    trace = problem.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or isinstance(problem, RecursionError):
        return False
    return Path(trace.tb_frame.f_code.co_filename).is_relative_to(_PACKAGE)


class UnreadableRow(dict[str, Any]):
    """A row of a source that could not be read, in the place of its columns."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason=reason, detail=_tidy(detail))

    def __reduce__(self) -> tuple[type[UnreadableRow], tuple[str, str]]:
        return UnreadableRow, (self["reason"], self["detail"])

    def problem(self) -> BadRow:
        """Why it cannot be used."""
        return BadRow(self["reason"], self["detail"])
