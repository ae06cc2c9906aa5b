"""Answers on disk as they come, so that a stopped run loses none and runs never mix.

During a run, each process appends to its own file in `partial/`. At the end they are joined into
one `answers_<role>.json` per model, in AMBER's own form, whatever the benchmark. `run.json` holds
the run's identity.

This module knows nothing about models or scores.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmdpo.benchmarks.base import Id
from vlmdpo.errors import DataError

RUN = "run.json"
PARTIAL = "partial"


def final_name(role: str) -> str:
    """The name of the file with all answers of one model ("base" or "tuned")."""
    return f"answers_{role}.json"


class AnswerStore:
    """The answers of one run: those of an earlier start, and those that come in now.

    Args:
        folder: the output folder.
        identity: everything the answers depend on; the folder of another run is refused.
        process: the index of this process, which writes its own file.

    Raises DataError if the folder holds something else or cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], process: int = 0) -> None:
        self.folder = folder
        self.by_role: dict[str, dict[Id, str]] = {}
        check(folder, identity)
        try:
            create(folder)
            if process == 0:  # first, so that a run killed at any moment is recognized
                write_json(folder / RUN, dict(identity))
            (folder / PARTIAL).mkdir(exist_ok=True)
            self.read()
            self._file = (folder / PARTIAL / f"{process}.jsonl").open("ab")
        except OSError as problem:
            raise _cannot_write(folder, problem) from problem

    def read(self) -> None:
        """Read all answers on disk, of every process. Raises DataError for a damaged file."""
        for role in ("base", "tuned"):
            path = self.folder / final_name(role)
            if path.is_file():
                for entry in _entries(path, path.read_text(encoding="utf-8")):
                    self.of(role)[entry["id"]] = entry["said"]
        for path in sorted((self.folder / PARTIAL).glob("*.jsonl")):
            self._read_partial(path)

    def of(self, role: str) -> dict[Id, str]:
        """The answers of one model, by id."""
        return self.by_role.setdefault(role, {})

    def put(self, role: str, answers: Iterable[tuple[Id, str]]) -> None:
        """Keep these (id, answer) pairs, and write them to disk at once."""
        try:
            for number, text in answers:
                self.of(role)[number] = text
                line = json.dumps({"who": role, "id": number, "said": text}, ensure_ascii=False)
                self._file.write(line.encode("utf-8", "replace") + b"\n")
            self._file.flush()
        except OSError as problem:
            raise _cannot_write(self.folder, problem) from problem

    def close(self) -> None:
        """Close this process's file. Raises DataError where what is left cannot be written."""
        try:
            self._file.close()
        except OSError as problem:
            raise _cannot_write(self.folder, problem) from problem

    def join(self, order: Sequence[Id], responses: Mapping[str, Mapping[Id, str]]) -> None:
        """Write one file per model, and remove the partial ones. For one process, at the end.

        Args:
            order: ids in the order of the file; those without an answer are left out.
            responses: by role and id, the response as the benchmark's scorer takes it.
        """
        for role, by_id in responses.items():
            entries = [
                {"id": n, "response": by_id[n], "said": self.by_role[role][n]}
                for n in order
                if n in by_id
            ]
            write_json(self.folder / final_name(role), entries)
        try:
            shutil.rmtree(self.folder / PARTIAL)
        except OSError as problem:
            raise _cannot_write(self.folder, problem) from problem

    def _read_partial(self, path: Path) -> None:
        """Read one process's file. A line cut short by a kill is removed, and asked again."""
        content = path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        # Not splitlines: answers may contain other line breaks.
        for line in complete.decode("utf-8").split("\n")[:-1]:
            for entry in _entries(path, f"[{line}]", ("who", "said")):
                self.of(entry["who"])[entry["id"]] = entry["said"]
        if complete != content:
            with path.open("r+b") as file:
                file.truncate(len(complete))


def check(folder: Path, identity: Mapping[str, Any] | None = None) -> None:
    """Raise DataError if a folder holds anything but answers, or those of another `identity`."""
    if folder.is_file():
        raise DataError(f"--output-dir: '{folder}' is a file")
    if not folder.is_dir():
        return
    if all(path.name == _part_of(folder / RUN).name for path in folder.iterdir()):
        return
    try:
        found = dict(json.loads((folder / RUN).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as problem:
        raise DataError(
            f"--output-dir: '{folder}' holds something else; choose an empty or new folder"
        ) from problem
    if identity is None:
        return
    for name in sorted(identity):
        there, here = found.get(name), identity.get(name)
        if there != here:
            raise DataError(
                f"--output-dir: '{folder}' holds answers of another run "
                f"({name.replace('_', ' ')}: {there} there, {here} now); choose another folder, "
                "or --overwrite"
            )


def prompt_date(folder: Path) -> str | None:
    """The date that prompts held when a folder's first answers were given; None without one.

    Raises DataError for a folder of other content.
    """
    check(folder)
    run = folder / RUN
    if not run.is_file():
        return None
    found = json.loads(run.read_text(encoding="utf-8")).get("prompt_date")
    return None if found is None else str(found)


def create(folder: Path) -> None:
    """Create the folder if it does not exist. Raises DataError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise _cannot_write(folder, problem) from problem


def clear(folder: Path) -> None:
    """Remove a folder of answers. Raises DataError if it holds anything else."""
    check(folder)
    try:
        if folder.is_dir():
            shutil.rmtree(folder)
    except OSError as problem:
        raise _cannot_write(folder, problem) from problem


def write_json(path: Path, data: Any) -> None:
    """Write JSON under a temporary name, then rename. Raises DataError."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text under a temporary name, then rename. Raises DataError."""
    part = _part_of(path)
    try:
        part.write_text(text, encoding="utf-8", errors="replace")
        part.rename(path)
    except OSError as problem:
        raise _cannot_write(path.parent, problem) from problem


def _part_of(path: Path) -> Path:
    """The temporary name under which a file is written."""
    return path.with_name(f".{path.name}.partial")


def _entries(path: Path, text: str, keys: Sequence[str] = ("said",)) -> list[dict[str, Any]]:
    """A JSON list of entries with an id and texts under `keys`. Raises DataError."""
    damaged = f"'{path}' is damaged; remove it, or use --overwrite to ask again"
    try:
        entries: list[dict[str, Any]] = json.loads(text)
        is_valid = all(
            type(entry["id"]) in (int, str) and all(isinstance(entry[key], str) for key in keys)
            for entry in entries
        )
    except (ValueError, KeyError, TypeError) as problem:
        raise DataError(damaged) from problem
    if not is_valid:
        raise DataError(damaged)
    return entries


def _cannot_write(folder: Path, problem: OSError) -> DataError:
    return DataError(f"--output-dir: cannot write '{folder}': {problem.strerror or problem}")
