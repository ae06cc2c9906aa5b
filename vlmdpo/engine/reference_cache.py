"""Reference log-probs on disk: computed once per row, kept beside the prepared data, never used
where anything differs.

One Arrow file per key: row, chosen and rejected log-prob sums in nats. This module knows nothing of
trainers.

Shapes: B rows of a batch, R rows of the dataset.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from vlmdpo import ui

FOLDER = "reference-logprobs"
_MAX_PENDING_BATCHES = 256  # each takes a block of device memory
_COLUMNS = ("row", "ref_chosen_logps", "ref_rejected_logps")


def cache_key(facts: dict[str, Any]) -> str:
    """The name of one set of cached values: a hash of all that changes them."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class ReferenceCache:
    """Chosen and rejected reference log-probs of a dataset's rows, filled as they are computed.

    A file that is damaged, or does not belong here, is reported, not used, and written anew.

    Args:
        folder: the prepared dataset's folder; files lie in a folder below it.
        key: see `cache_key`. What is on disk under another key is never read.
        rows: how many rows the dataset has.
    """

    def __init__(self, folder: Path, key: str, rows: int) -> None:
        self.path = folder / FOLDER / f"{key}.arrow"
        self.key = key
        self._values_R2 = torch.full((rows, 2), math.nan, dtype=torch.float32)
        self._unsaved_rows: set[int] = set()
        self._pending: list[tuple[list[int], Tensor]] = []  # (rows, values_B2) as they were put
        self._load()

    @property
    def num_known(self) -> int:
        """How many rows have their log-probs."""
        self._collect()
        return int((~self._values_R2.isnan()).all(dim=1).sum())

    def holds(self, rows: Iterable[int]) -> bool:
        """Whether the log-probs of all these rows are known."""
        self._collect()
        return not bool(self._values_R2[list(rows)].isnan().any())

    def get(self, rows: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """(chosen, rejected) log-probs of these rows, or None where any is missing.

        Each is (B,), float32, on the CPU.
        """
        if any(not set(rows).isdisjoint(pending) for pending, _ in self._pending):
            self._collect()
        values_B2 = self._values_R2[list(rows)]
        return None if values_B2.isnan().any() else (values_B2[:, 0], values_B2[:, 1])

    def put(self, rows: Sequence[int], chosen: Tensor, rejected: Tensor) -> None:
        """Keep the log-probs (B,) of these rows.

        They stay on their device until they are asked for or saved: copying waits for it. Only then
        FloatingPointError is raised if one is not finite.
        """
        values_B2 = torch.stack([chosen, rejected], dim=1).detach().float()
        self._pending.append((list(rows), values_B2))
        if len(self._pending) >= _MAX_PENDING_BATCHES:
            self._collect()

    def _collect(self) -> None:
        """Copy what was put into `_values_R2`."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        rows = [row for batch_rows, _ in pending for row in batch_rows]
        values_N2 = torch.cat([values_B2 for _, values_B2 in pending]).cpu()
        if not values_N2.isfinite().all():
            raise FloatingPointError("a reference log-prob is not finite")
        self._values_R2[rows] = values_N2
        self._unsaved_rows.update(rows)

    def unsaved(self) -> list[tuple[int, float, float]]:
        """What was put since the last save, as (row, chosen, rejected)."""
        self._collect()
        return [(row, *self._values_R2[row].tolist()) for row in sorted(self._unsaved_rows)]

    def save(self, others: Iterable[tuple[int, float, float]] = (), *, write: bool = True) -> None:
        """Write everything known, under a temporary name first.

        Every process calls this and one writes. A folder that cannot be written costs the reuse,
        not the run.

        Args:
            others: (row, chosen, rejected) that other processes computed.
            write: whether this process writes.
        """
        self._collect()
        changed = bool(self._unsaved_rows)
        for row, chosen, rejected in others:
            changed = True
            self._values_R2[row] = torch.tensor([chosen, rejected])
        self._unsaved_rows.clear()
        if not (write and changed):
            return
        partial = self.path.with_suffix(".partial")
        try:
            self.path.parent.mkdir(exist_ok=True)
            with (
                pa.OSFile(str(partial), "wb") as file,
                pa.ipc.new_file(file, self._table().schema) as writer,
            ):
                writer.write_table(self._table())
            partial.replace(self.path)
        except OSError as problem:
            ui.warn(
                f"reference log-probs are not kept: cannot write '{self.path}': "
                f"{problem.strerror or problem}"
            )

    def _table(self) -> pa.Table:
        rows = (~self._values_R2.isnan()).all(dim=1).nonzero().flatten()
        columns = [rows.numpy(), self._values_R2[rows, 0].numpy(), self._values_R2[rows, 1].numpy()]
        table = pa.table(dict(zip(_COLUMNS, columns, strict=True)))
        return table.replace_schema_metadata(
            {"key": self.key, "rows": str(len(self._values_R2)), "digest": _digest(table)}
        )

    def _load(self) -> None:
        if not self.path.is_file():
            return
        try:
            with pa.OSFile(str(self.path), "rb") as file:
                table = pa.ipc.open_file(file).read_all()
            metadata = {
                name.decode(): value.decode()
                for name, value in (table.schema.metadata or {}).items()
            }
            if (metadata.get("key"), metadata.get("rows")) != (
                self.key,
                str(len(self._values_R2)),
            ):
                raise ValueError("it belongs to other data or another reference")
            if metadata.get("digest") != _digest(table):
                raise ValueError("its content does not match its digest")
            rows = torch.from_numpy(table["row"].to_numpy().copy())
            columns = [torch.from_numpy(table[name].to_numpy().copy()) for name in _COLUMNS[1:]]
        except (pa.ArrowException, OSError, ValueError, KeyError) as problem:
            reason = str(problem).splitlines()[0]
            ui.warn(f"'{self.path}' is not used and will be made anew: {reason}")
            return
        self._values_R2[rows] = torch.stack(columns, dim=1)


def _digest(table: pa.Table) -> str:
    parts = [table[name].to_numpy().tobytes() for name in _COLUMNS]
    return hashlib.sha256(b"|".join(parts)).hexdigest()
