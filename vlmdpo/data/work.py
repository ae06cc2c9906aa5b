"""Units of a source → checked shards on disk, in this process or in several, so that a killed run goes on.

Every unit ends as one shard and one record of what became of its rows; the record is written last, and a unit without
one is done again. Which process does a unit changes nothing in it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, Protocol

from vlmdpo import ui
from vlmdpo.data import images, store
from vlmdpo.data.images import BadImage, Picture
from vlmdpo.data.pairs import BadRow, PreferencePair, TokenCounts, check
from vlmdpo.data.schemas import Schema
from vlmdpo.data.sources import Source, Unit
from vlmdpo.errors import DataError

EXAMPLES_KEPT = 3  # bad rows remembered by reason and unit
_GO_ON = "what is done stays; the same command goes on from there"


class Measure(Protocol):
    """Counts tokens as the model's processor makes them. See `vlmdpo.dpo.lengths`."""

    def count(self, pair: PreferencePair, pictures: list[Picture]) -> TokenCounts:
        """Raises BadRow where the chat template or processor refuses the row."""

    def trim(self, pair: PreferencePair, pictures: list[Picture], limit: int) -> tuple[PreferencePair, TokenCounts]:
        """The pair with its answers cut to `limit` tokens in all. Raises BadRow where its prompt leaves no room."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is done to every row, the same in every process."""

    source: Source
    schema: Schema
    max_image_side: int | None
    max_length: int | None
    over_length: str
    on_bad: str
    folder: Path
    make_measure: Callable[[], Measure]


@dataclass
class Tally:
    """What became of a unit's rows.

    Attributes:
        kept: for every row of the shard: source row, its key, the key of its swapped copy, its pictures' keys, the
            names of what was put right in it, and its pictures' longer sides in pixels.
    """

    rows_in: int = 0
    kept: list[tuple[int, str, str, tuple[str, ...], list[str], list[int]]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, row: int, why: str) -> None:
        """Count a row that cannot be used, and remember the first few."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        kept = self.examples.setdefault(reason, [])
        if len(kept) < EXAMPLES_KEPT:
            kept.append(f"row {row}: {why}")

    def change(self, names: Iterable[str]) -> None:
        """Count what was put right in a row that stays."""
        for name in names:
            self.changed[name] = self.changed.get(name, 0) + 1

    def add(self, other: dict[str, Any]) -> None:
        """Take in another unit's counts and examples."""
        self.rows_in += other["rows_in"]
        for reason, count in other["dropped"].items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
        for reason, shown in other["examples"].items():
            kept = self.examples.setdefault(reason, [])
            kept += shown[: EXAMPLES_KEPT - len(kept)]


def shard_path(folder: Path, number: int) -> Path:
    """The shard of a unit in the working folder."""
    return folder / f"{number:06d}.arrow"


def record_path(folder: Path, number: int) -> Path:
    """What became of a unit's rows; there once its shard is whole."""
    return folder / f"{number:06d}.json"


def is_done(folder: Path, number: int) -> bool:
    """Whether a unit's shard is whole: its record is there, and the shard has the size that the record tells."""
    try:
        record = json.loads(record_path(folder, number).read_text(encoding="utf-8"))
        return bool(shard_path(folder, number).stat().st_size == record["bytes"])
    except (OSError, ValueError, KeyError):  # none, or cut short by a crash: do the unit again
        return False


def do_unit(job: Job, unit: Unit, measure: Measure, tick: Callable[[], None]) -> None:
    """Check, bound, count and write the rows of a unit. Raises DataError for a full disk, and with `on_bad` "fail"."""
    tally = Tally()
    path = shard_path(job.folder, unit.number)
    try:
        with store.ShardWriter(path) as shard:
            for number, row in enumerate(job.source.rows(unit), start=unit.first):
                try:
                    shard.add(_row(job, measure, number, row, tally))
                except (BadRow, BadImage) as problem:
                    if job.on_bad == "fail":
                        name = job.source.name
                        raise DataError(f"'{name}' row {number}: {problem.reason}: {problem}") from problem
                    tally.drop(problem.reason, number, str(problem))
                tally.rows_in += 1
                tick()
        record = {**vars(tally), "first": unit.first, "last": unit.last, "bytes": path.stat().st_size}
        partial = path.with_name(f"{path.stem}.json.{os.getpid()}")
        partial.write_text(json.dumps(record), encoding="utf-8")
        partial.replace(record_path(job.folder, unit.number))
    except OSError as problem:
        free = ui.human_bytes(shutil.disk_usage(job.folder).free) if job.folder.exists() else "nothing"
        raise DataError(
            f"cannot write below '{job.folder}': {problem.strerror or problem} ({free} free); {_GO_ON}"
        ) from problem


def _row(job: Job, measure: Measure, number: int, row: dict[str, Any], tally: Tally) -> dict[str, Any]:
    pair = check(job.schema.draft(row), job.source.root)
    pictures = [images.bound(data, job.max_image_side) for data in pair.images]
    counts = measure.count(pair, pictures)
    changes = [*pair.notes, *dict.fromkeys(change for picture in pictures for change in picture.changes)]
    if job.max_length is not None and counts.longest > job.max_length:
        if job.over_length == "drop":
            raise BadRow("over_length", f"{counts.longest} tokens, {counts.images} of them images, over {job.max_length}")
        pair, counts = measure.trim(pair, pictures, job.max_length)
        changes.append("answers_trimmed")
    tally.kept.append((number, *pair.keys(), changes, [max(picture.size) for picture in pictures]))
    return store.row_of(pair, pictures, counts, number)


def do_all(job: Job, units: Iterable[Unit], num_proc: int, measure: Measure, advance: Callable[[int], None]) -> int:
    """Do every unit that is not done yet. Returns how many units there are.

    Args:
        num_proc: processes; 1 is this one.
        measure: this process's own; others make theirs.
        advance: told how many rows are done since it was last told.

    Raises:
        DataError: what a unit raises, or a process that died.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    count = 0

    def waiting() -> Iterator[Unit]:
        nonlocal count
        for unit in units:
            count = unit.number + 1
            if is_done(job.folder, unit.number):
                advance(unit.last - unit.first)
            else:
                yield unit

    if num_proc == 1:
        for unit in waiting():
            do_unit(job, unit, measure, lambda: advance(1))
    else:
        _in_processes(job, waiting(), num_proc, advance)
    return count


def context(num_proc: int, preload: list[str]) -> None:
    """Start what several processes will be forked from, so that it imports `preload` while this one is busy."""
    if num_proc > 1 and "forkserver" in multiprocessing.get_all_start_methods():
        from multiprocessing import forkserver

        multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
        forkserver.ensure_running()


def _in_processes(job: Job, units: Iterator[Unit], num_proc: int, advance: Callable[[int], None]) -> None:
    # A clean server process is forked, never this one: it may hold threads and locks, and copies of those hang.
    methods = multiprocessing.get_all_start_methods()
    start = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    slots = list(range(2 * num_proc))
    progress = start.RawArray("q", [0] * (len(slots) + 1))  # rows done by the unit in each slot; the last says stop
    seen = [0] * len(slots)
    running: dict[Future[None], int] = {}

    def look() -> None:
        for slot, rows in enumerate(progress[:-1]):
            if rows > seen[slot]:
                advance(rows - seen[slot])
                seen[slot] = rows

    pool = ProcessPoolExecutor(num_proc, mp_context=start, initializer=_begin, initargs=(job, progress))
    try:
        exhausted = False
        while running or not exhausted:
            while slots and not exhausted:
                unit = next(units, None)
                exhausted = unit is None
                if unit is not None:
                    slot = slots.pop()
                    progress[slot] = seen[slot] = 0
                    running[pool.submit(_do_in_process, unit, slot)] = slot
            done, _ = wait(running, timeout=0.3, return_when=FIRST_COMPLETED)
            look()
            for future in done:
                future.result()
                slots.append(running.pop(future))
    except BrokenProcessPool as problem:
        raise DataError(
            f"a process of --num-proc {num_proc} died, as one does that runs out of memory; {_GO_ON}, with fewer processes too"
        ) from problem
    finally:
        progress[len(progress) - 1] = 1
        pool.shutdown(wait=True, cancel_futures=True)


_here: dict[str, Any] = {}  # what a worker process works with


def _begin(job: Job, progress: Any) -> None:
    """Make a worker process ready, and let it end with its parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    warnings.simplefilter("ignore")  # what libraries say when they are imported, the parent's own import has said
    measure = job.make_measure()
    import torch

    torch.set_num_threads(1)
    _here.update(job=job, progress=progress, measure=measure)


class _Stop(Exception):
    """The parent has another unit's error, or Ctrl-C, and wants no more."""


def _do_in_process(unit: Unit, slot: int) -> None:
    progress = _here["progress"]

    def tick() -> None:
        progress[slot] += 1
        if progress[len(progress) - 1]:
            raise _Stop

    do_unit(_here["job"], unit, _here["measure"], tick)
