"""Reference log-probs on disk: one for each answer, kept beside the prepared data, never used where
anything differs.

An answer is known by what it answers (see `content_keys`), not by its row. One Arrow file for each
set of facts that change log-probs: answer, and its log-prob sum in nats. This module knows nothing
of trainers.

Shapes: R rows of TRL's loss, one for each answer of the batch's pairs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from vlmdpo import ui
from vlmdpo.data.store import REFERENCE_CACHE
from vlmdpo.engine.content_keys import NO_ANSWER
from vlmdpo.engine.devices import to_device

_PREFIX = "answers-"  # files of earlier versions, by row number, have none
_MAX_PENDING_BATCHES = 256  # each takes a block of device memory
_COLUMNS = ("answer", "ref_logps")


def cache_key(facts: dict[str, Any]) -> str:
    """The name of one set of cached values: a hash of all that changes them."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class ReferenceLogps:
    """Reference log-probs of answers by their keys, filled as they are computed.

    The first value of an answer stays: wherever it is asked for again, in other pairs and batches,
    it is the same to the bit.

    Args:
        known: log-probs found before.
    """

    def __init__(self, known: Mapping[str, float] = MappingProxyType({})) -> None:
        self._unsaved: list[str] = []
        self._pending: list[tuple[list[str], Tensor]] = []  # (keys, values_R) as they were put
        self._pending_keys: set[str] = set()
        self._values = {NO_ANSWER: 0.0, **known}

    @property
    def num_known(self) -> int:
        """How many answers have their log-prob."""
        self._collect()
        return len(self._values) - 1

    def missing(self, keys: Iterable[str]) -> set[str]:
        """Those of these keys whose log-probs are not known."""
        self._collect()
        return {key for key in keys if key not in self._values}

    def get(self, keys: Sequence[str]) -> Tensor | None:
        """(R,) log-probs of these answers, float32, on the CPU; None where any is missing."""
        self._collect_if_pending(keys)
        values = [self._values.get(key) for key in keys]
        return None if None in values else torch.tensor(values, dtype=torch.float32)

    def put(self, keys: Sequence[str], logps_R: Tensor) -> Tensor:
        """Keep the log-probs of these answers; returns (R,) those that hold from now on.

        They differ from the ones given for an answer that was known, or stands here twice. New ones
        stay on their device until they are asked for or saved: copying waits for it. Only then
        FloatingPointError is raised if one is not finite.
        """
        self._collect_if_pending(keys)
        logps_R = logps_R.detach().float()
        first: dict[str, int] = {}
        for place, key in enumerate(keys):
            first.setdefault(key, place)
        if len(first) < len(keys):
            places = torch.tensor([first[key] for key in keys])
            logps_R = logps_R[to_device(places, logps_R.device)]
        if any(key in self._values for key in first):
            known_R = torch.tensor([self._values.get(key, math.nan) for key in keys])
            known_R = to_device(known_R, logps_R.device)
            logps_R = torch.where(known_R.isnan(), logps_R, known_R)
        self._pending.append((list(keys), logps_R))
        self._pending_keys.update(keys)
        if len(self._pending) >= _MAX_PENDING_BATCHES:
            self._collect()
        return logps_R

    def _collect_if_pending(self, keys: Sequence[str]) -> None:
        """Wait for the device only if it has the log-prob of one of these answers."""
        if not self._pending_keys.isdisjoint(keys):
            self._collect()

    def _collect(self) -> None:
        """Copy what was put into `_values`."""
        pending, self._pending = self._pending, []
        self._pending_keys.clear()
        if not pending:
            return
        values_N = torch.cat([values_R for _, values_R in pending]).cpu()
        if not values_N.isfinite().all():
            raise FloatingPointError("a reference log-prob is not finite")
        keys = (key for batch_keys, _ in pending for key in batch_keys)
        for key, value in zip(keys, values_N.tolist(), strict=True):
            if key not in self._values:
                self._values[key] = value
                self._unsaved.append(key)

    def unsaved(self) -> list[tuple[str, float]]:
        """What was put since the last save, as (key, log-prob)."""
        self._collect()
        return [(key, self._values[key]) for key in self._unsaved]


class ReferenceCache(ReferenceLogps):
    """Reference log-probs that stay on disk, also after a resume.

    A file that is damaged, or does not belong here, is reported, not used, and written anew.

    Args:
        folder: the prepared dataset's folder; files lie in a folder below it.
        key: see `cache_key`. What is on disk under another key is never read.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.path = folder / REFERENCE_CACHE / f"{_PREFIX}{key}.arrow"
        self.key = key
        self._file_state: tuple[int, ...] | None = None  # when it was last read or written
        super().__init__(self._read())
        self._name_old_files()

    def save(self, of_all: Sequence[tuple[str, float]] = (), *, write: bool = True) -> None:
        """Write everything known, under a temporary name first.

        Every process calls this and one writes. A folder that cannot be written costs the reuse,
        not the run.

        Args:
            of_all: `unsaved` of all processes, in their order, this one included. Where two have
                computed the same answer, all take the first one's from now on.
            write: whether this process writes.
        """
        self._collect()
        changed = bool(self._unsaved or of_all)
        self._values |= dict(reversed(of_all))
        self._unsaved.clear()
        if not (write and changed):
            return
        # Another run on the same data may have written since.
        others = self._read() if self._state_of_file() != self._file_state else {}
        table = self._table({**others, **self._values})
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(exist_ok=True)
            with (
                pa.OSFile(str(partial), "wb") as file,
                pa.ipc.new_file(file, table.schema) as writer,
            ):
                writer.write_table(table)
            partial.replace(self.path)
        except OSError as problem:
            ui.warn(
                f"reference log-probs are not kept: cannot write '{self.path}': "
                f"{problem.strerror or problem}"
            )
        self._file_state = self._state_of_file()

    def _table(self, values: dict[str, float]) -> pa.Table:
        keys = sorted(key for key in values if key != NO_ANSWER)
        logps = pa.array([values[key] for key in keys], type=pa.float32())
        columns = [pa.array(keys, type=pa.string()), logps]
        table = pa.table(dict(zip(_COLUMNS, columns, strict=True)))
        return table.replace_schema_metadata({"key": self.key, "digest": _digest(table)})

    def _read(self) -> dict[str, float]:
        """What the file holds; nothing if there is none that can be used."""
        self._file_state = self._state_of_file()
        if self._file_state is None:
            return {}
        try:
            with pa.OSFile(str(self.path), "rb") as file:
                table = pa.ipc.open_file(file).read_all()
            metadata = {
                name.decode(): value.decode()
                for name, value in (table.schema.metadata or {}).items()
            }
            if metadata.get("key") != self.key:
                raise ValueError("it belongs to another reference")
            if not table.schema.equals(_SCHEMA) or any(c.null_count for c in table.columns):
                raise ValueError("it has other columns")
            table.validate(full=True)  # damaged offsets would lead outside of memory
            if metadata.get("digest") != _digest(table):
                raise ValueError("its content does not match its digest")
            return dict(zip(*(table[name].to_pylist() for name in _COLUMNS), strict=True))
        except (pa.ArrowException, OSError, ValueError, KeyError) as problem:
            reason = str(problem).splitlines()[0]
            ui.warn(f"'{self.path}' is not used and will be made anew: {reason}")
            return {}

    def _state_of_file(self) -> tuple[int, ...] | None:
        """What changes when another run writes the file; None if there is none."""
        try:
            found = self.path.stat()
        except OSError:  # absent, or in a folder that cannot be read, which writing reports
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _name_old_files(self) -> None:
        """Say which files of earlier versions, by row number, are not used."""
        files = sorted(self.path.parent.glob("*.arrow"))
        old = [file.name for file in files if not file.name.startswith(_PREFIX)]
        if old:
            ui.say(
                "reference log-probs of an earlier version are not used, because they are by row; "
                f"delete them from '{self.path.parent}': {', '.join(old)}"
            )


_SCHEMA = pa.schema(list(zip(_COLUMNS, (pa.string(), pa.float32()), strict=True)))


def _digest(table: pa.Table) -> str:
    answers, logps = (table[name] for name in _COLUMNS)
    parts = ["\n".join(answers.to_pylist()).encode(), logps.to_numpy().tobytes()]
    return hashlib.sha256(b"|".join(parts)).hexdigest()
