"""Answers and judgments on disk, a line for each prompt, written as they come.

Several processes write parts of their own, which are joined at the end. A line that a kill cut
short is removed, and its prompt asked again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from vlmdpo.data import growing_jsonl
from vlmdpo.distributed.processes import ProcessGroup
from vlmdpo.engine.sampling import Sample
from vlmdpo.errors import DataError
from vlmdpo.feedback.judges.base import Judgment, Statement


class Records:
    """The lines of one file by the id of their prompt; as a context, open for more.

    Args:
        path: the file.
        processes: those of the run, all of which make such an object.

    Raises DataError for a file that is damaged or cannot be written.
    """

    def __init__(self, path: Path, processes: ProcessGroup) -> None:
        self.path, self._processes = path, processes
        self.by_id: dict[str, dict[str, Any]] = {}
        self._file: TextIO | None = None
        if processes.index == 0:
            self._tidy()
        processes.barrier()
        self._read()
        processes.barrier()  # no process writes before all have read

    def __enter__(self) -> Records:
        own = self.path
        if self._processes.count > 1:
            own = growing_jsonl.part(self.path, self._processes.index)
        try:
            # What UTF-8 cannot hold is written as JSON writes it: \udc80.
            self._file = own.open("a", encoding="utf-8", errors="backslashreplace")
        except OSError as problem:
            raise self._cannot_write(problem) from problem
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        assert self._file is not None
        try:
            self._file.close()  # writes what is left, of a line that a full disk cut short too
        except OSError as error:
            if problem is None:
                raise self._cannot_write(error) from error

    def add(self, entry: dict[str, Any]) -> None:
        """Keep a line, and write it at once."""
        assert self._file is not None
        self.by_id[entry["id"]] = entry
        try:
            self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as problem:
            raise self._cannot_write(problem) from problem

    def join(self, ids: Sequence[str]) -> None:
        """Bring the lines of all processes together, in this order. For every process, at the end.

        Args:
            ids: those of all prompts.
        """
        self._processes.barrier()
        if self._processes.index == 0:
            self._tidy()
            try:
                growing_jsonl.sort(self.path, ids)
            except OSError as problem:
                raise self._cannot_write(problem) from problem
        self._processes.barrier()
        self._read()

    def _tidy(self) -> None:
        try:
            growing_jsonl.collect(self.path)
            if self.path.exists():
                growing_jsonl.rewrite(self.path, growing_jsonl.complete_lines(self.path))
        except OSError as problem:
            raise self._cannot_write(problem) from problem
        except UnicodeDecodeError as problem:
            raise self._damaged(problem) from problem

    def _read(self) -> None:
        if not self.path.exists():
            return
        try:
            lines = growing_jsonl.complete_lines(self.path)
            self.by_id = {entry["id"]: entry for entry in map(json.loads, lines)}
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise self._damaged(problem) from problem

    def _damaged(self, problem: Exception) -> DataError:
        return DataError(f"'{self.path}' is damaged ({problem}); remove it, or add --overwrite")

    def _cannot_write(self, problem: OSError) -> DataError:
        return DataError(f"--output-dir: cannot write '{self.path}': {problem.strerror or problem}")


def samples_in(entry: dict[str, Any]) -> list[Sample]:
    """The samples of a line."""
    return [Sample(**one) for one in entry["samples"]]


def as_entry(judgment: Judgment) -> dict[str, Any]:
    """A judgment as JSON; what is empty is left out."""
    kept = {
        "statements": [
            {name: value for name, value in asdict(one).items() if value not in ("", None)}
            for one in judgment.statements
        ],
        "unread": judgment.unread,
    }
    return {name: value for name, value in kept.items() if value}


def judgments_in(entry: dict[str, Any]) -> dict[str, Judgment]:
    """The judgments of a line, by answer."""
    return {
        answer: Judgment(
            tuple(Statement(**one) for one in found.get("statements", ())), found.get("unread", "")
        )
        for answer, found in zip(entry["answers"], entry["judgments"], strict=True)
    }
