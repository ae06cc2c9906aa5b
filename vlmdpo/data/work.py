"""Process the units of a source into checked shards on disk, in one process or in several.

Each unit becomes one shard and one record of what happened to its rows. The record is written last,
and a unit without one is processed again, so a killed run can continue. A unit's shard does not
depend on the process that makes it.
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
from vlmdpo.data import store
from vlmdpo.data.images import EncodedImage, bounded
from vlmdpo.data.mixture import Mixture
from vlmdpo.data.pairs import PreferencePair, TokenCounts, check
from vlmdpo.data.reasons import BadRow, UnreadableRow
from vlmdpo.data.sources import Unit
from vlmdpo.errors import DataError

_POLL_S = 0.05  # between looks at the progress of other processes
MAX_EXAMPLES = 3  # dropped rows remembered per reason and unit
_HOW_TO_CONTINUE = "finished work is kept; the same command continues from there"


class TokenCounter(Protocol):
    """Counts tokens with the model's processor. See `vlmdpo.engine.lengths`."""

    def count(self, pair: PreferencePair, images: list[EncodedImage]) -> TokenCounts:
        """Raises BadRow if the chat template or processor refuses the row."""

    def notes(self, pair: PreferencePair) -> tuple[str, ...]:
        """The names of what is odd about a pair for this model."""

    def trim(
        self, pair: PreferencePair, images: list[EncodedImage], limit: int
    ) -> tuple[PreferencePair, TokenCounts]:
        """The pair with answers cut so that each sequence has at most `limit` tokens.

        Raises BadRow if the prompt leaves no room.
        """


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is done to every row, in every process."""

    mixture: Mixture
    max_image_side: int | None
    max_length: int | None
    over_length: str
    on_bad: str
    folder: Path
    make_counter: Callable[[], TokenCounter]


@dataclass
class RowCounts:
    """What happened to a unit's rows.

    Attributes:
        kept: for each row of the shard: source row, its key, the key of its swapped copy, the keys
            of its images, the names of what was corrected, and the images' longer sides in pixels.
        votes: when a person chose between the answers, by the place in `kept`; of votes alone.
    """

    rows_in: int = 0
    kept: list[tuple[int, str, str, tuple[str, ...], list[str], list[int]]] = field(
        default_factory=list
    )
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    votes: dict[int, str] = field(default_factory=dict)

    def drop(self, reason: str, row: str, why: str) -> None:
        """Count a dropped row, and remember the first few."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        kept = self.examples.setdefault(reason, [])
        if len(kept) < MAX_EXAMPLES:
            kept.append(f"{row}: {why}")

    def change(self, names: Iterable[str]) -> None:
        """Count what was corrected in a row that is kept."""
        for name in names:
            self.changed[name] = self.changed.get(name, 0) + 1

    def add(self, other: dict[str, Any]) -> None:
        """Add another unit's counts and examples."""
        self.rows_in += other["rows_in"]
        for reason, count in other["dropped"].items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
        for reason, shown in other["examples"].items():
            kept = self.examples.setdefault(reason, [])
            kept += shown[: MAX_EXAMPLES - len(kept)]


def shard_path(folder: Path, number: int) -> Path:
    """The shard of a unit in the working folder."""
    return folder / f"{number:06d}.arrow"


def record_path(folder: Path, number: int) -> Path:
    """The record of a unit, which exists once its shard is complete."""
    return folder / f"{number:06d}.json"


def is_done(folder: Path, number: int) -> bool:
    """Whether a unit's shard is complete: it has the size that its record gives."""
    try:
        record = json.loads(record_path(folder, number).read_text(encoding="utf-8"))
        return bool(shard_path(folder, number).stat().st_size == record["bytes"])
    except (OSError, ValueError, KeyError):  # absent, or truncated by a crash
        return False


def process_unit(job: Job, unit: Unit, counter: TokenCounter, on_row: Callable[[], None]) -> None:
    """Check, reduce, count and write the rows of a unit.

    Raises DataError for a full disk, and for the first bad row if `on_bad` is "fail".
    """
    row_counts, part = RowCounts(), job.mixture.parts[unit.part]
    path = shard_path(job.folder, unit.number)
    try:
        with store.ShardWriter(path) as shard:
            for number, row in enumerate(job.mixture.rows(unit), start=unit.first):
                try:
                    shard.add(_process_row(job, counter, unit, number, row, row_counts))
                except BadRow as problem:
                    if job.on_bad == "fail":
                        raise DataError(
                            f"'{part.source.name}' row {number} (counted from 0): "
                            f"{problem.reason}: {problem}"
                        ) from problem
                    row_counts.drop(problem.reason, part.row(number), str(problem))
                row_counts.rows_in += 1
                on_row()
        record = {
            **vars(row_counts),
            "part": unit.part,
            "offset": unit.offset,
            "first": unit.first,
            "last": unit.last,
            "bytes": path.stat().st_size,
        }
        partial = path.with_name(f"{path.stem}.json.{os.getpid()}")
        partial.write_text(json.dumps(record), encoding="utf-8")
        partial.replace(record_path(job.folder, unit.number))
    except OSError as problem:
        free = shutil.disk_usage(job.folder).free if job.folder.exists() else 0
        raise DataError(
            f"cannot write in '{job.folder}': {problem.strerror or problem} "
            f"({ui.human_bytes(free)} free); "
            f"{_HOW_TO_CONTINUE}"
        ) from problem


def _process_row(
    job: Job,
    counter: TokenCounter,
    unit: Unit,
    number: int,
    row: dict[str, Any],
    row_counts: RowCounts,
) -> dict[str, Any]:
    """A source row as a row of the dataset. Raises BadRow."""
    part = job.mixture.parts[unit.part]
    if isinstance(row, UnreadableRow):
        raise row.problem()
    pair = check(part.schema.unchecked_pair(row), part.source.root, part.source.allowed)
    images = [bounded(data, job.max_image_side) for data in pair.images]
    counts = counter.count(pair, images)
    image_changes = dict.fromkeys(change for image in images for change in image.changes)
    changes = [*pair.notes, *counter.notes(pair), *image_changes]
    if job.max_length is not None and counts.longest > job.max_length:
        if job.over_length == "drop":
            raise BadRow(
                "over_length",
                f"{counts.longest} tokens, {counts.images} of them images, over {job.max_length}",
            )
        pair, counts = counter.trim(pair, images, job.max_length)
        changes.append("answers_trimmed")
    if pair.voted_at is not None:
        row_counts.votes[len(row_counts.kept)] = pair.voted_at
    number += unit.offset
    row_counts.kept.append((number, *pair.keys(), changes, [max(image.size) for image in images]))
    return store.row_of(pair, images, counts, number)


def process_all(
    job: Job,
    units: Iterable[Unit],
    num_proc: int,
    counter: TokenCounter,
    advance: Callable[[int], None],
) -> int:
    """Process every unit that is not done yet. Returns the number of all units.

    Args:
        num_proc: processes, including this one.
        counter: for this process; the others make their own.
        advance: called with the number of rows done since its last call.

    Raises:
        DataError: from a unit, or for a process that died.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    count = 0

    def unfinished() -> Iterator[Unit]:
        nonlocal count
        for unit in units:
            count = unit.number + 1
            if is_done(job.folder, unit.number):
                advance(unit.last - unit.first)
            else:
                yield unit

    if num_proc == 1:
        for unit in unfinished():
            process_unit(job, unit, counter, lambda: advance(1))
    else:
        _process_in_parallel(job, unfinished(), num_proc, counter, advance)
    return count


def start_forkserver(num_proc: int, preload: list[str]) -> None:
    """Start the server that worker processes are forked from, if there will be any. It imports
    `preload` while this process is busy.
    """
    if num_proc > 1 and "forkserver" in multiprocessing.get_all_start_methods():
        from multiprocessing import forkserver, resource_tracker

        multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
        # This process handles Ctrl-C; the server gets the signal too, and inherits that it is
        # blocked. The tracker is started first, because that would unblock the signal again.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _process_in_parallel(
    job: Job,
    units: Iterator[Unit],
    num_proc: int,
    counter: TokenCounter,
    advance: Callable[[int], None],
) -> None:
    """Process units in this process too, from the start: workers take seconds to load libraries."""
    workers = _WorkerPool(job, units, num_proc - 1, advance)
    try:
        for unit in units:
            process_unit(job, unit, counter, workers.on_row)
        while workers.running:
            workers.collect(wait_s=0.3)
    except BrokenProcessPool as problem:
        raise DataError(
            f"one of --num-proc {num_proc} processes died, probably out of memory; "
            f"{_HOW_TO_CONTINUE}, also with fewer processes"
        ) from problem
    finally:
        workers.stop()


class _WorkerPool:
    """Processes beside this one that process one unit at a time. Each counts its rows in a slot of
    shared memory.
    """

    def __init__(
        self, job: Job, units: Iterator[Unit], processes: int, advance: Callable[[int], None]
    ) -> None:
        # Never fork this process: it may hold threads and locks, whose copies hang.
        methods = multiprocessing.get_all_start_methods()
        start = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        self.running: dict[Future[None], int] = {}
        self._units, self._advance = units, advance
        self._slots = list(range(processes))
        self._seen = [0] * processes
        # Rows done in each slot; the last entry tells workers to stop.
        self._progress = start.RawArray("q", [0] * (processes + 1))
        self._last_poll = time.monotonic()
        self._pool = ProcessPoolExecutor(
            processes, mp_context=start, initializer=_start_worker, initargs=(job, self._progress)
        )
        # Submitting to the pool blocks until the first worker has loaded its libraries, so it is
        # done in a thread.
        self._thread = ThreadPoolExecutor(1)
        self._ready = self._thread.submit(lambda: self._pool.submit(_no_op).result())

    def submit(self) -> None:
        """Give a unit to each idle worker, once workers are ready."""
        if not self._ready.done():
            return
        self._ready.result()
        while self._slots and (unit := next(self._units, None)) is not None:
            slot = self._slots.pop()
            self._progress[slot] = self._seen[slot] = 0
            self.running[self._pool.submit(_process_in_worker, unit, slot)] = slot

    def collect(self, wait_s: float) -> None:
        """Report progress and free idle workers.

        Raises what a unit raised, and BrokenProcessPool if a worker died.
        """
        done, _ = wait(self.running, timeout=wait_s, return_when=FIRST_COMPLETED)
        for slot, rows in enumerate(self._progress[:-1]):
            if rows > self._seen[slot]:
                self._advance(rows - self._seen[slot])
                self._seen[slot] = rows
        for future in done:
            future.result()
            self._slots.append(self.running.pop(future))

    def on_row(self) -> None:
        """Count a row of this process, and now and then attend to the workers."""
        self._advance(1)
        if time.monotonic() - self._last_poll > _POLL_S:
            self._last_poll = time.monotonic()
            self.collect(wait_s=0)
            self.submit()

    def stop(self) -> None:
        """End all workers; a busy one stops at its next row."""
        self._progress[len(self._progress) - 1] = 1
        self._thread.shutdown(wait=True)
        self._pool.shutdown(wait=True, cancel_futures=True)


_worker: dict[str, Any] = {}  # the state of a worker process


def _start_worker(job: Job, progress: Any) -> None:
    """Initialize a worker process, which ends with its parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    warnings.simplefilter("ignore")  # the parent has shown the warnings of these imports
    counter = job.make_counter()
    import torch

    torch.set_num_threads(1)
    _worker.update(job=job, progress=progress, counter=counter)


def _no_op() -> None:
    """Shows that a worker is ready."""


class _Stopped(Exception):
    """The parent is ending: an error in another unit, or Ctrl-C."""


def _process_in_worker(unit: Unit, slot: int) -> None:
    progress = _worker["progress"]

    def on_row() -> None:
        progress[slot] += 1
        if progress[len(progress) - 1]:
            raise _Stopped

    process_unit(_worker["job"], unit, _worker["counter"], on_row)
