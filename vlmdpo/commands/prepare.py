"""`vlmdpo prepare`: check preference pairs from any source, bound their images, store them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmdpo import __version__, ui
from vlmdpo.commands.prepare_screen import REPORT, show, show_summary
from vlmdpo.commands.prepare_sources import key_facts, open_mixture
from vlmdpo.config import PrepareConfig
from vlmdpo.data import assemble, groups, store, work
from vlmdpo.data.folder_lock import locked
from vlmdpo.data.images import open_bytes
from vlmdpo.data.mixture import Mixture, summary
from vlmdpo.data.sources import as_stored
from vlmdpo.errors import DataError, VlmDpoError
from vlmdpo.models.registry import short_name

__all__ = ["run", "show"]

_ROWS_PER_PROCESS = 4_000  # fewer are done before another process has imported its libraries
_MAX_PROCESSES = 32
_MOST_PER_CORE = 4  # processes for each core that --num-proc can ask for
LENGTHS = "lengths.png"


def run(config: PrepareConfig) -> dict[str, Any]:
    """Prepare the data, or find it prepared.

    Returns the manifest with `path`, `reused` and an `example` row.

    Raises:
        DataError: unreadable source, unknown format, no usable row, a full disk, an output folder
            that holds something else, a failed upload.
        ModelError: no processor of `--model`, which bounds the images and counts tokens.
    """
    if config.output_dir is not None:
        store.check_target(config.output_dir)
    mixture = open_mixture(config)
    num_proc = _processes(config.num_proc, mixture.count)
    work.start_forkserver(num_proc, ["vlmdpo.engine.lengths"])
    from vlmdpo.engine.lengths import load_token_counter
    from vlmdpo.models.configured import prompt_settings
    from vlmdpo.models.digest import processor_digest
    from vlmdpo.models.image_limits import default_image_side
    from vlmdpo.models.rendering import announce

    counter = load_token_counter(
        config.model, config.revision, config.trust_remote_code, prompt_settings(config)
    )
    announce(counter.processor)
    side = config.max_image_side or default_image_side(counter.processor)
    facts = key_facts(mixture, config, side) | {
        "processor": processor_digest(counter.processor, dated=False)
    }
    several = len(mixture.parts) > 1
    name = "mix" if several else short_name(mixture.parts[0].source.name)
    folder = config.output_dir or Path("outputs") / "data" / f"{name}-{store.key_of(facts)[:8]}"
    with locked(folder, "preparing", waits=True):
        manifest = store.read_manifest(folder)
        reused = (
            manifest is not None and manifest["key"] == store.key_of(facts) and not config.overwrite
        )
        if not reused:
            store.check_output(folder, config.overwrite)
            manifest = _prepare(mixture, facts, counter, num_proc, folder, config)
        assert manifest is not None
        if config.report and not (folder / REPORT).is_file():  # prepared with --no-report
            _write_report(folder, manifest, _count_image_sides(folder, manifest))
    report = {**manifest, "path": str(folder), "reused": reused}
    try:
        if config.push_to_hub:
            from vlmdpo import hub

            hub.dataset(folder, manifest, config.push_to_hub, private=config.private)
        return {**report, "example": _example(counter, folder, config.show)}
    except VlmDpoError:  # the data is prepared all the same: say so, and where it is
        show_summary(report)
        raise


def _processes(asked: int | None, rows: int | None) -> int:
    """Worker processes: those asked for, up to some for each core, else by the number of rows,
    which is None if it is unknown.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if asked is not None:
        most = cores * _MOST_PER_CORE
        if asked > most:
            ui.warn(f"--num-proc {asked:,}: using {most}, as this machine has {cores} cores")
        return min(asked, most)
    wanted = cores if rows is None else rows // _ROWS_PER_PROCESS
    return max(1, min(cores, wanted, _MAX_PROCESSES))


def _prepare(
    mixture: Mixture,
    facts: dict[str, Any],
    counter: Any,
    num_proc: int,
    folder: Path,
    config: PrepareConfig,
) -> dict[str, Any]:
    """Process all rows into `folder`, which appears when it is complete. Returns the manifest."""
    from vlmdpo.engine.lengths import load_token_counter
    from vlmdpo.models.rendering import rendering_of, set_rendering

    key = store.key_of(facts)
    work_folder = folder.with_name(f".{folder.name}.partial")
    prompts = rendering_of(counter.processor).settings
    prompts = dataclasses.replace(prompts, date=_open_work_folder(work_folder, key, prompts.date))
    set_rendering(counter.processor, prompts, config.model)
    job = work.Job(
        mixture=mixture,
        max_image_side=facts["max_image_side"],
        max_length=config.max_length,
        over_length=config.over_length,
        on_bad=config.on_bad,
        folder=work_folder / "units",
        make_counter=functools.partial(
            load_token_counter,
            config.model,
            config.revision,
            config.trust_remote_code,
            prompts,
        ),
    )
    with ui.progress("prepare", mixture.count, unit="rows") as bar:
        units = work.process_all(job, mixture.units(), num_proc, counter, bar.advance)
    settings = assemble.SplitSettings(
        test_size=config.test_size, shuffle=config.shuffle, seed=config.seed
    )
    plan = assemble.plan(job.folder, units, mixture.parts, settings, config.on_bad)
    result = work_folder / "result"
    size = assemble.write(job.folder, plan, result, key)
    manifest = {
        **facts,
        "key": key,
        "split": config.split,
        "model": config.model,
        "processor_class": type(counter.processor).__name__,  # says the model's family
        "prompt_date": prompts.date,
        "sources": summary(mixture.parts, plan.parts),
        **_outcome(plan, result, size),
    }
    try:
        if config.report:
            _write_report(result, manifest, plan.sides)
        (result / store.MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        store.replace(folder, result)
    except OSError as problem:
        raise DataError(f"cannot write '{folder}': {problem.strerror or problem}") from problem
    shutil.rmtree(work_folder, ignore_errors=True)
    return manifest


def _open_work_folder(folder: Path, key: str, date: str | None) -> str | None:
    """Make the hidden folder in which units are processed. What an interrupted call with the same
    key left in it is kept; anything else is removed.

    Returns the date that prompts hold: `date`, or that of the interrupted call.
    """
    key_file, date_file = folder / "key", folder / "date"
    try:
        is_ours = key_file.is_file() and key_file.read_text(encoding="utf-8") == key
        if is_ours:
            ui.say("continuing where an earlier call stopped")
        elif folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if is_ours and date_file.is_file():
            return date_file.read_text(encoding="utf-8")
        if date is not None:
            date_file.write_text(date, encoding="utf-8")
        key_file.write_text(key, encoding="utf-8")
    except OSError as problem:
        raise DataError(f"cannot write '{folder}': {problem.strerror or problem}") from problem
    return date


def _outcome(plan: assemble.Plan, folder: Path, size: int) -> dict[str, Any]:
    splits = {split: len(rows) for split, rows in plan.splits.items()}
    return {
        "rows_in": plan.row_counts.rows_in,
        "rows_out": sum(splits.values()),
        "splits": splits,
        "dropped": dict(sorted(plan.row_counts.dropped.items())),
        "dropped_examples": dict(sorted(plan.row_counts.examples.items())),
        "changed": dict(sorted(plan.row_counts.changed.items())),
        "distinct": groups.count_distinct([store.load(folder, split) for split in splits]),
        "lengths": _length_summary(folder, list(splits)),
        "bytes": size,
        "versions": _versions(),
    }


def _length_summary(folder: Path, splits: list[str]) -> dict[str, dict[str, float]]:
    """Minimum, median, 95th percentile and maximum number of tokens, by kind."""
    import numpy

    counted = {
        name: numpy.concatenate([_column(folder, split, name) for split in splits])
        for name in store.COUNTS
    }
    longest = counted["prompt_tokens"] + numpy.maximum(
        counted["chosen_tokens"], counted["rejected_tokens"]
    )
    return {
        name: {
            "min": int(tokens.min()),
            "median": float(numpy.median(tokens)),
            "p95": float(numpy.percentile(tokens, 95)),
            "max": int(tokens.max()),
        }
        for name, tokens in {**counted, "longest_tokens": longest}.items()
    }


def _column(folder: Path, split: str, name: str) -> Any:
    """A column as a numpy array."""
    return store.load(folder, split).with_format("numpy")[name][:]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("datasets", "pillow", "pyarrow", "transformers")
    return {
        "vlmdpo": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def _count_image_sides(folder: Path, manifest: Mapping[str, Any]) -> dict[int, int]:
    """{longer side in pixels: number of images} of a finished folder."""
    rows = (row for split in manifest["splits"] for row in as_stored(store.load(folder, split)))
    return Counter(
        max(open_bytes(stored["bytes"]).size) for row in rows for stored in row["images"]
    )


def _write_report(folder: Path, manifest: dict[str, Any], sides: Mapping[int, int]) -> None:
    """report.html and its histogram of lengths."""
    from vlmdpo.report import prepare_page

    columns = {name: _column(folder, "train", name) for name in store.COUNTS}
    prepare_page.draw_lengths(columns, folder / LENGTHS)
    page = prepare_page.page(manifest, store.load(folder), folder / LENGTHS, sides)
    part = folder / f".{REPORT}.partial"
    part.write_text(page, encoding="utf-8")
    part.replace(folder / REPORT)


def _example(counter: Any, folder: Path, number: int) -> dict[str, Any]:
    """One row as the model will read it. Raises DataError if there is no such row."""
    from vlmdpo.engine.preview import preview

    dataset = store.load(folder)
    if number >= len(dataset):
        raise DataError(
            f"--show: there is no row {number}; '{folder}' has {ui.count(len(dataset), 'row')} to "
            "train on, counted from 0"
        )
    return {
        "row": number,
        "source_row": dataset[number]["source_row"],
        **preview(counter.collator, dataset[number]),
    }
