"""The output folder of `vlmdpo train`: whether it may be used, its recipe, its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vlmdpo import ui
from vlmdpo.config import PER_CALL, TrainConfig, recipes
from vlmdpo.errors import ConfigError, DataError

RECIPE = "recipe.yaml"  # the resolved settings; its presence marks a folder as a training run
# Rows beyond --max-length: their tokens, and whether they were dropped or trimmed.
OVER_LENGTH = "over_length.jsonl"
# A recipe repeats a run, so options of one call or one machine are left out of it.
_NOT_IN_RECIPE = {
    *("resume", "overwrite", "doctor", "dry_run", "gpu", *PER_CALL),
    *("num_machines", "machine_rank", "main_process_ip", "main_process_port"),
}


def check(folder: Path, config: TrainConfig) -> TrainConfig:
    """The settings, with `overwrite` if the user agreed to it when asked.

    Raises DataError for a folder that cannot be written, holds something else, or holds an earlier
    run without `--resume` or `--overwrite`.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise DataError(f"--output-dir: cannot write '{folder}': '{nearest}' is a file")
    if not os.access(nearest, os.W_OK):
        raise DataError(f"--output-dir: cannot write '{folder}': no permission in '{nearest}'")
    in_use = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if in_use and not (folder / RECIPE).is_file():
        raise DataError(
            f"--output-dir: '{folder}' holds something else; choose an empty or new folder"
        )
    if in_use and not (config.resume or config.overwrite):
        if not ui.confirm(f"'{folder}' holds an earlier run. Replace it?"):
            raise DataError(
                f"--output-dir: '{folder}' holds an earlier run; add --resume or --overwrite, or "
                "choose another folder"
            )
        return dataclasses.replace(config, overwrite=True)
    if in_use and config.resume:
        _warn_of_changed_settings(folder, config)
    return config


def check_apart(folder: Path, adapter: Path | None) -> None:
    """Raise DataError for an output folder that is, or holds, the adapter to go on from: its
    results, or `--overwrite`, would replace it.
    """
    if adapter is None:
        return
    wanted, kept = folder.absolute().resolve(), adapter.absolute().resolve()
    if wanted == kept or wanted in kept.parents:
        raise DataError(
            f"--output-dir: '{folder}' holds the adapter that training goes on from; choose "
            "another folder"
        )


def _warn_of_changed_settings(folder: Path, config: TrainConfig) -> None:
    """Warn if a run is resumed with other settings: its result is then not that of one run."""
    try:
        started_with = recipes.read_recipe(folder / RECIPE)
    except ConfigError as problem:
        raise DataError(
            f"--resume: the settings that '{folder}' was started with cannot be read: {problem}"
        ) from problem
    now = recipes.plain(config, without=_NOT_IN_RECIPE)
    changed = [
        f"{name} {started_with.get(name)} → {value}"
        for name, value in now.items()
        if started_with.get(name) != value
    ]
    if changed:
        ui.warn(f"--resume with other settings than the run started with: {', '.join(changed)}")


def start(
    folder: Path, config: TrainConfig, over_length: list[dict[str, Any]], last: Path | None
) -> None:
    """Make the folder a run's: remove an earlier run if asked, and write the recipe.

    That of a run that is resumed from `last` stays as it is until training goes on: see `go_on`.

    Raises DataError if it cannot be written.
    """
    from vlmdpo.training import checkpoints

    with _writing(folder):
        if config.overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_partial(folder)
        # The recipe comes first: from now on the folder is recognized as a run.
        if last is None:
            _write_recipe(folder, config)
        if over_length:
            lines = "".join(json.dumps(row) + "\n" for row in over_length)
            (folder / OVER_LENGTH).write_text(lines, encoding="utf-8")


def go_on(folder: Path, config: TrainConfig, last: Path) -> None:
    """What a resumed run changes in its folder, once its checkpoint was read: write its settings,
    and set aside the damaged checkpoints after it, whose steps will be written again.

    Raises DataError if it cannot be written.
    """
    from vlmdpo.training import checkpoints

    listed = checkpoints.list_checkpoints(folder)
    with _writing(folder):
        checkpoints.set_aside(listed[listed.index(last) + 1 :])
        _write_recipe(folder, config)


def _write_recipe(folder: Path, config: TrainConfig) -> None:
    settings = recipes.plain(config, without=_NOT_IN_RECIPE)
    part = folder / f".{RECIPE}.partial"
    part.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    part.replace(folder / RECIPE)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise DataError(
            f"--output-dir: cannot write '{folder}': {problem.strerror or problem}"
        ) from problem


def checkpoint_to_resume(folder: Path, processes: int) -> Path | None:
    """The last whole checkpoint, or None; says which it is, or that there is none.

    Damaged ones after it are named. So is another number of `processes` than wrote it: each has its
    own random numbers and rows.

    Raises DataError if none of several is whole.
    """
    from vlmdpo.training import checkpoints

    last, damaged = checkpoints.last_whole(folder)
    for path, reason in damaged.items():
        ui.warn(f"{path.name} is damaged: {reason}")
    if last is None and damaged:
        raise DataError(
            f"--resume: no checkpoint in '{folder}' is whole; start again with --overwrite, "
            "or in another --output-dir to keep what is there"
        )
    if last is None:
        ui.say(f"no checkpoint in '{folder}' yet: starting from the beginning")
        return None
    ui.say(f"resuming from {last.name}")
    wrote = len(list(last.glob("rng_state*.pth")))
    if wrote != processes:
        ui.warn(
            f"{last.name} was written by {ui.count(wrote, 'process', 'processes')}, and this run "
            f"has {processes}: random "
            "numbers and the order of rows will differ from those of an unbroken run"
        )
    return last


@contextlib.contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Inside, an error leaves no empty folder behind: the trainer makes it before it is set up."""
    try:
        yield
    except BaseException:  # Ctrl-C too; it is raised again
        with contextlib.suppress(OSError):  # it is not empty: an earlier run
            folder.rmdir()
        raise
