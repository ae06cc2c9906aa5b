"""Checkpoints that are complete or absent: written under a hidden name and renamed at the end.

Older checkpoints are removed the same way. Each carries a list of its files, by which a damaged one
is known before anything is read from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from vlmdpo import ui
from vlmdpo.errors import DataError
from vlmdpo.models import weight_files

if TYPE_CHECKING:
    from accelerate import Accelerator

FILES = "files.json"  # the list: bytes and SHA-256 of every other file
_DAMAGED = ".damaged"  # what a damaged checkpoint's name gets
# One of each row is needed to go on; of the optimizer, by how the run was shared out.
_NEEDED = (
    ("trainer_state.json",),
    ("scheduler.pt", "global_step*"),
    ("rng_state*.pth",),
    ("optimizer.pt", "optimizer.bin", "optimizer_*", "rank*optimizer.pt", "global_step*"),
    ("*model*.safetensors", "*model*.bin", "pytorch_model_fsdp*", "global_step*"),
)
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
    folder: Path,
    step: int,
    keep: int | None,
    accelerator: Accelerator,
    *,
    best_step: int | None = None,
) -> Iterator[Path]:
    """Inside, every process writes its part of a checkpoint below the path given; then it is named.

    Args:
        folder: the run's output folder.
        keep: how many checkpoints stay; None for all.
        best_step: a step whose checkpoint stays beside them.

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
            _write_list(partial / name)
            _sync_to_disk(partial / name)
            (partial / name).replace(folder / name)
            partial.rmdir()
            _remove_oldest(folder, keep, best_step)
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


def _remove_oldest(folder: Path, keep: int | None, best_step: int | None) -> None:
    best = None if best_step is None else checkpoint_name(best_step)
    old = list_checkpoints(folder)[:-keep] if keep else []
    for path in (path for path in old if path.name != best):
        # Renamed first, so that a kill halfway leaves no damaged checkpoint under its name.
        path.replace(folder / _OLD)
        shutil.rmtree(folder / _OLD)


def _contents(folder: Path) -> dict[str, Path]:
    """The files of a checkpoint by name, without the list."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths if path != folder / FILES}


def _digests(paths: list[Path]) -> list[str]:
    """SHA-256 of each file, several at once: an optimizer's state may take gigabytes."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(min(4, len(paths) or 1)) as pool:
        return list(pool.map(digest, paths))


def _write_list(folder: Path) -> None:
    files = _contents(folder)
    listed = {
        name: {"bytes": path.stat().st_size, "sha256": digest}
        for (name, path), digest in zip(files.items(), _digests(list(files.values())), strict=True)
    }
    (folder / FILES).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, as in "'optimizer.pt' is missing"; None if it is whole.

    One of an earlier version has no list: there, what must be there and what a file's form says
    about its end is looked at.
    """
    files = _contents(folder)
    if not (folder / FILES).is_file():
        for names in _NEEDED:
            if not any(found for name in names for found in folder.glob(name)):
                return f"'{names[0]}' is missing"
        malformed = {name: _malformed(path) for name, path in files.items()}
        return next((f"'{name}' {why}" for name, why in malformed.items() if why), None)
    try:
        listed = json.loads((folder / FILES).read_text(encoding="utf-8"))
        wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return f"'{FILES}' cannot be read"
    missing = [name for name in wanted if name not in files]
    if missing:
        return f"'{missing[0]}' is missing"
    resized = [name for name in wanted if files[name].stat().st_size != wanted[name][0]]
    if resized:
        return f"'{resized[0]}' is cut off"
    found = dict(zip(wanted, _digests([files[name] for name in wanted]), strict=True))
    changed = [name for name in wanted if found[name] != wanted[name][1]]
    return f"'{changed[0]}' has changed since it was written" if changed else None


def _malformed(path: Path) -> str | None:
    """What is wrong with a file by its form alone."""
    if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
        return "is cut off"
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return "is not valid JSON"
    return weight_files.damage(path)


def last_whole(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The last checkpoint that is whole, and what is wrong with each one after it."""
    damaged: dict[Path, str] = {}
    for path in reversed(list_checkpoints(folder)):
        reason = damage(path)
        if reason is None:
            return path, damaged
        damaged[path] = reason
    return None, damaged


def set_aside(damaged: Iterable[Path]) -> None:
    """Rename damaged checkpoints, so that the resumed run can write those steps again."""
    for path in damaged:
        aside = path.with_name(path.name + _DAMAGED)
        shutil.rmtree(aside, ignore_errors=True)
        path.replace(aside)
