"""Checkpoints that are whole or not there: written under a hidden name, renamed at the end; older
ones go the same way.

This module knows nothing of what a checkpoint holds.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vlmdpo import ui
from vlmdpo.errors import DataError

_PARTIAL, _OLD = ".checkpoint.partial", ".checkpoint.old"
_TORCH_CANNOT_WRITE = (
    "PytorchStreamWriter",
    "unexpected pos",
    "inline_container",
)  # a full disk, in its words


def name_of(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"checkpoint-{step}"


def found(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    named = [
        path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)
    ]
    return sorted(named, key=lambda path: int(path.name.partition("-")[2]))


def tidy(folder: Path) -> None:
    """Remove what a killed run left half-written or half-removed."""
    for name in (_PARTIAL, _OLD):
        shutil.rmtree(folder / name, ignore_errors=True)


@contextlib.contextmanager
def written(folder: Path, step: int, keep: int | None, accelerator: Any) -> Iterator[Path]:
    """Inside, every process writes its part of a checkpoint below the path given; then it gets its
    name.

    Args:
        folder: the run's output folder.
        keep: how many checkpoints stay; None all.

    Raises DataError for a disk that is full or cannot be written.
    """
    partial, name = folder / _PARTIAL, name_of(step)
    writes = accelerator.is_main_process
    try:
        if writes:
            tidy(folder)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        yield partial
        accelerator.wait_for_everyone()
        if writes:
            (partial / name / "training_args.bin").unlink(
                missing_ok=True
            )  # a pickle, and nothing reads it
            _to_disk(partial / name)
            (partial / name).replace(folder / name)
            partial.rmdir()
            _forget(folder, keep)
        accelerator.wait_for_everyone()
    except (OSError, RuntimeError, SafetensorError) as problem:
        if isinstance(problem, RuntimeError) and not any(
            words in str(problem) for words in _TORCH_CANNOT_WRITE
        ):
            raise
        tidy(folder)
        last = next(iter(reversed(found(folder))), None)
        stays = (
            f"{last.name} stays whole, and --resume goes on from it"
            if last
            else "there is no earlier one"
        )
        free = ui.human_bytes(shutil.disk_usage(folder).free)
        why = (
            getattr(problem, "strerror", None) or f"writing stopped short ({free} free on the disk)"
        )
        raise DataError(f"cannot write {name} below '{folder}': {why}; {stays}") from problem


def _to_disk(folder: Path) -> None:
    """Wait until the files are on the disk itself: a name must not outlive its content when the
    machine goes down.
    """
    for path in (*(path for path in folder.rglob("*") if path.is_file()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _forget(folder: Path, keep: int | None) -> None:
    for path in found(folder)[:-keep] if keep else []:
        path.replace(folder / _OLD)  # first out of sight, then file by file
        shutil.rmtree(folder / _OLD)
