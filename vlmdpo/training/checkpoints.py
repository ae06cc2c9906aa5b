"""Checkpoints that are complete or absent: written under a hidden name and renamed at the end.

Older checkpoints are removed the same way. This module knows nothing of what a checkpoint holds.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from vlmdpo import ui
from vlmdpo.errors import DataError

if TYPE_CHECKING:
    from accelerate import Accelerator

_PARTIAL, _OLD = ".checkpoint.partial", ".checkpoint.old"
# How PyTorch reports a full disk.
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "unexpected pos", "inline_container")


def checkpoint_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"checkpoint-{step}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    named = [
        path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)
    ]
    return sorted(named, key=lambda path: int(path.name.partition("-")[2]))


def remove_partial(folder: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for name in (_PARTIAL, _OLD):
        shutil.rmtree(folder / name, ignore_errors=True)


@contextlib.contextmanager
def atomic_checkpoint(
    folder: Path, step: int, keep: int | None, accelerator: Accelerator
) -> Iterator[Path]:
    """Inside, every process writes its part of a checkpoint below the path given; then it is named.

    Args:
        folder: the run's output folder.
        keep: how many checkpoints stay; None for all.

    Raises DataError if the disk is full or cannot be written.
    """
    partial, name = folder / _PARTIAL, checkpoint_name(step)
    writes = accelerator.is_main_process
    try:
        if writes:
            remove_partial(folder)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        yield partial
        accelerator.wait_for_everyone()
        if writes:
            # A pickle, which nothing reads.
            (partial / name / "training_args.bin").unlink(missing_ok=True)
            _sync_to_disk(partial / name)
            (partial / name).replace(folder / name)
            partial.rmdir()
            _remove_oldest(folder, keep)
        accelerator.wait_for_everyone()
    except (OSError, RuntimeError, SafetensorError) as problem:
        if isinstance(problem, RuntimeError) and not any(
            words in str(problem) for words in _TORCH_CANNOT_WRITE
        ):
            raise
        remove_partial(folder)
        raise DataError(_cannot_write(folder, name, problem)) from problem


def _cannot_write(folder: Path, name: str, problem: Exception) -> str:
    last = next(iter(reversed(list_checkpoints(folder))), None)
    kept = (
        f"{last.name} is intact; continue from it with --resume"
        if last
        else "there is no earlier checkpoint"
    )
    free = ui.human_bytes(shutil.disk_usage(folder).free)
    reason = getattr(problem, "strerror", None) or f"the write was cut short ({free} free on disk)"
    return f"cannot write {name} in '{folder}': {reason}; {kept}"


def _sync_to_disk(folder: Path) -> None:
    """Wait until the files are on the disk itself: no name may outlive its content in a crash."""
    for path in (*(path for path in folder.rglob("*") if path.is_file()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_oldest(folder: Path, keep: int | None) -> None:
    for path in list_checkpoints(folder)[:-keep] if keep else []:
        # Renamed first, so that a kill halfway leaves no damaged checkpoint under its name.
        path.replace(folder / _OLD)
        shutil.rmtree(folder / _OLD)
