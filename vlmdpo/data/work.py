"""Units of a source → checked shards on disk, in this process or in several, so that a killed run
goes on.

Every unit ends as one shard and one record of what became of its rows; the record is written last,
and a unit without one is done again. Which process does a unit changes nothing in it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
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

_LOOK_S = 0.05  # between looks at what other processes have done
EXAMPLES_KEPT = 3  # bad rows remembered by reason and unit
_GO_ON = "what is done stays; the same command goes on from there"


class Measure(Protocol):
    """Counts tokens as the model's processor makes them. See `vlmdpo.engine.lengths`."""

    def count(self, pair: PreferencePair, pictures: list[Picture]) -> TokenCounts:
        """Raises BadRow where the chat template or processor refuses the row."""

    def trim(
        self, pair: PreferencePair, pictures: list[Picture], limit: int
    ) -> tuple[PreferencePair, TokenCounts]:
        """The pair with its answers cut to `limit` tokens in all. Raises BadRow where its prompt
        leaves no room.
        """


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
        kept: for every row of the shard: source row, its key, the key of its swapped copy, its
            pictures' keys, the names of what was put right in it, and its pictures' longer sides in
            pixels.
    """

    rows_in: int = 0
    kept: list[tuple[int, str, str, tuple[str, ...], list[str], list[int]]] = field(
        default_factory=list
    )
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
    """Whether a unit's shard is whole: its record is there, and the shard has the size that the
    record tells.
    """
    try:
        record = json.loads(record_path(folder, number).read_text(encoding="utf-8"))
        return bool(shard_path(folder, number).stat().st_size == record["bytes"])
    except (OSError, ValueError, KeyError):  # none, or cut short by a crash: do the unit again
        return False


def do_unit(job: Job, unit: Unit, measure: Measure, tick: Callable[[], None]) -> None:
    """Check, bound, count and write the rows of a unit. Raises DataError for a full disk, and with
    `on_bad` "fail".
    """
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
                        raise DataError(
                            f"'{name}' row {number}: {problem.reason}: {problem}"
                        ) from problem
                    tally.drop(problem.reason, number, str(problem))
                tally.rows_in += 1
                tick()
        record = {
            **vars(tally),
            "first": unit.first,
            "last": unit.last,
            "bytes": path.stat().st_size,
        }
        partial = path.with_name(f"{path.stem}.json.{os.getpid()}")
        partial.write_text(json.dumps(record), encoding="utf-8")
        partial.replace(record_path(job.folder, unit.number))
    except OSError as problem:
        free = (
            ui.human_bytes(shutil.disk_usage(job.folder).free) if job.folder.exists() else "nothing"
        )
        raise DataError(
            f"cannot write below '{job.folder}': {problem.strerror or problem} ({free} free); "
            f"{_GO_ON}"
        ) from problem


def _row(
    job: Job, measure: Measure, number: int, row: dict[str, Any], tally: Tally
) -> dict[str, Any]:
    pair = check(job.schema.draft(row), job.source.root)
    pictures = [images.bound(data, job.max_image_side) for data in pair.images]
    counts = measure.count(pair, pictures)
    changes = [
        *pair.notes,
        *dict.fromkeys(change for picture in pictures for change in picture.changes),
    ]
    if job.max_length is not None and counts.longest > job.max_length:
        if job.over_length == "drop":
            raise BadRow(
                "over_length",
                f"{counts.longest} tokens, {counts.images} of them images, over {job.max_length}",
            )
        pair, counts = measure.trim(pair, pictures, job.max_length)
        changes.append("answers_trimmed")
    tally.kept.append((number, *pair.keys(), changes, [max(picture.size) for picture in pictures]))
    return store.row_of(pair, pictures, counts, number)


def do_all(
    job: Job, units: Iterable[Unit], num_proc: int, measure: Measure, advance: Callable[[int], None]
) -> int:
    """Do every unit that is not done yet. Returns how many units there are.

    Args:
        num_proc: processes, this one among them.
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
        _in_processes(job, waiting(), num_proc, measure, advance)
    return count


def context(num_proc: int, preload: list[str]) -> None:
    """Start what several processes will be forked from, so that it imports `preload` while this one
    is busy.
    """
    if num_proc > 1 and "forkserver" in multiprocessing.get_all_start_methods():
        from multiprocessing import forkserver, resource_tracker

        multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
        # Ctrl-C is this process's to handle; the server, which is told too, inherits that it is
        # not.
        resource_tracker.ensure_running()  # before: starting it would unblock the signal again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_processes(
    job: Job, units: Iterator[Unit], num_proc: int, measure: Measure, advance: Callable[[int], None]
) -> None:
    """This process works too, from the first moment: the others need seconds to load their
    libraries.
    """
    others = _Others(job, units, num_proc - 1, advance)
    try:
        for unit in units:
            do_unit(job, unit, measure, others.tick)
        while others.running:
            others.harvest(wait_s=0.3)
    except BrokenProcessPool as problem:
        raise DataError(
            f"a process of --num-proc {num_proc} died, as one does that runs out of memory; "
            f"{_GO_ON}, with fewer processes too"
        ) from problem
    finally:
        others.stop()


class _Others:
    """Processes beside this one, one unit at a time each. A slot is a place in shared memory where
    one counts its rows.
    """

    def __init__(
        self, job: Job, units: Iterator[Unit], processes: int, advance: Callable[[int], None]
    ) -> None:
        # A clean server process is forked, never this one: it may hold threads and locks, and
        # copies of those hang.
        methods = multiprocessing.get_all_start_methods()
        start = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        self.running: dict[Future[None], int] = {}
        self._units, self._advance = units, advance
        self._slots = list(range(processes))
        self._seen = [0] * processes
        self._progress = start.RawArray(
            "q", [0] * (processes + 1)
        )  # rows done in each slot; the last says stop
        self._looked = time.monotonic()
        self._pool = ProcessPoolExecutor(
            processes, mp_context=start, initializer=_begin, initargs=(job, self._progress)
        )
        self._aside = ThreadPoolExecutor(
            1
        )  # asking for the first process waits until its libraries are loaded
        self._ready = self._aside.submit(lambda: self._pool.submit(_nothing).result())

    def feed(self) -> None:
        """Give a unit to each process that has none, once there are processes."""
        if not self._ready.done():
            return
        self._ready.result()
        while self._slots and (unit := next(self._units, None)) is not None:
            slot = self._slots.pop()
            self._progress[slot] = self._seen[slot] = 0
            self.running[self._pool.submit(_do_in_process, unit, slot)] = slot

    def harvest(self, wait_s: float) -> None:
        """Take in what was done. Raises what a unit raised, and BrokenProcessPool where a process
        died.
        """
        done, _ = wait(self.running, timeout=wait_s, return_when=FIRST_COMPLETED)
        for slot, rows in enumerate(self._progress[:-1]):
            if rows > self._seen[slot]:
                self._advance(rows - self._seen[slot])
                self._seen[slot] = rows
        for future in done:
            future.result()
            self._slots.append(self.running.pop(future))

    def tick(self) -> None:
        """One row was done by this process; now and then, see to the others."""
        self._advance(1)
        if time.monotonic() - self._looked > _LOOK_S:
            self._looked = time.monotonic()
            self.harvest(wait_s=0)
            self.feed()

    def stop(self) -> None:
        """End all: a process that is at work stops at its next row."""
        self._progress[len(self._progress) - 1] = 1
        self._aside.shutdown(wait=True)
        self._pool.shutdown(wait=True, cancel_futures=True)


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
    warnings.simplefilter(
        "ignore"
    )  # what libraries say when they are imported, the parent's own import has said
    measure = job.make_measure()
    import torch

    torch.set_num_threads(1)
    _here.update(job=job, progress=progress, measure=measure)


def _nothing() -> None:
    """What a process does to show that it is there."""


class _Stop(Exception):
    """The parent has another unit's error, or Ctrl-C, and wants no more."""


def _do_in_process(unit: Unit, slot: int) -> None:
    progress = _here["progress"]

    def tick() -> None:
        progress[slot] += 1
        if progress[len(progress) - 1]:
            raise _Stop

    do_unit(_here["job"], unit, _here["measure"], tick)
