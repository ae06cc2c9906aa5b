"""A folder that only one process works in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from vlmdpo import ui
from vlmdpo.errors import DataError


@contextlib.contextmanager
def locked(folder: Path, doing: str, *, waits: bool = False) -> Iterator[None]:
    """Inside, no other process does the same in this folder. The lock of a killed process is
    released.

    Args:
        doing: what another process does there, in messages: "preparing".
        waits: whether to wait for the other one; else DataError is raised at once.

    Raises DataError also where the folder cannot be written.
    """
    import filelock

    whole = folder.absolute()
    # Its file stays: one that is removed while another process waits for it would let in two.
    lock = filelock.FileLock(whole.with_name(f".{whole.name}.lock"))
    try:
        whole.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as problem:
            if not waits:
                raise DataError(
                    f"--output-dir: another vlmdpo is {doing} '{folder}'; wait for it, or choose "
                    "another folder"
                ) from problem
            ui.say(f"waiting: another vlmdpo is {doing} '{folder}'")
            lock.acquire()
    except OSError as problem:
        raise DataError(
            f"--output-dir: cannot write '{folder}': {problem.strerror or problem}"
        ) from problem
    try:
        yield
    finally:
        lock.release()
