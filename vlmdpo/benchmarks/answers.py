"""Answers on disk as they come, so that a stopped run loses nothing and never mixes with another.
No models, no scores.

While a run goes on, each process appends to a file of its own below `partial/`; the last to end
joins them into one `answers_<who>.json` each, in AMBER's own form. `run.json` says whose answers
these are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmdpo.errors import DataError

RUN = "run.json"
PARTIAL = "partial"


def final_name(who: str) -> str:
    """The name of the file that holds all answers of one model ("base" or "tuned")."""
    return f"answers_{who}.json"


class Answers:
    """The answers of one run: what an earlier start of it left, and what comes in now.

    Args:
        folder: the output folder.
        identity: all that the answers depend on; another run's folder is refused.
        process: this process's number; it writes its own file.

    Raises DataError where the folder holds another run's answers or something else, or cannot be
    written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], process: int = 0) -> None:
        self.folder = folder
        self.said: dict[str, dict[int, str]] = {}
        check(folder, identity)
        try:
            make(folder)
            if process == 0:  # first of all, so that a run killed at any moment is known again
                write_json(folder / RUN, dict(identity))
            (folder / PARTIAL).mkdir(exist_ok=True)
            self.read()
            self._file = (folder / PARTIAL / f"{process}.jsonl").open("ab")
        except OSError as problem:
            raise _cannot_write(folder, problem) from problem

    def read(self) -> None:
        """What is on disk, other processes' answers too. Raises DataError where a file is damaged."""
        for who in ("base", "tuned"):
            path = self.folder / final_name(who)
            if path.is_file():
                for entry in _entries(path, path.read_text(encoding="utf-8")):
                    self.of(who)[entry["id"]] = entry["said"]
        for path in sorted((self.folder / PARTIAL).glob("*.jsonl")):
            self._read_partial(path)

    def of(self, who: str) -> dict[int, str]:
        """What one model has said, by id."""
        return self.said.setdefault(who, {})

    def put(self, who: str, answers: Iterable[tuple[int, str]]) -> None:
        """Keep these answers, at once on disk."""
        try:
            for number, text in answers:
                self.of(who)[number] = text
                line = json.dumps({"who": who, "id": number, "said": text}, ensure_ascii=False)
                self._file.write(line.encode("utf-8", "replace") + b"\n")
            self._file.flush()
        except OSError as problem:
            raise _cannot_write(self.folder, problem) from problem

    def close(self) -> None:
        """This process writes no more."""
        self._file.close()

    def join(self, order: Sequence[int], responses: Mapping[str, Mapping[int, str]]) -> None:
        """Write one file for each model, in this order of ids, and remove the partial ones; for one
        process, at the end.

        Args:
            order: ids; those without answer are left out.
            responses: by model and id, the response as AMBER's scorer takes it.
        """
        for who, by_id in responses.items():
            entries = [
                {"id": n, "response": by_id[n], "said": self.said[who][n]}
                for n in order
                if n in by_id
            ]
            write_json(self.folder / final_name(who), entries)
        try:
            shutil.rmtree(self.folder / PARTIAL)
        except OSError as problem:
            raise _cannot_write(self.folder, problem) from problem

    def _read_partial(self, path: Path) -> None:
        """A line cut short by a kill is cut off: it is asked again."""
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for line in whole.decode("utf-8").split("\n")[
            :-1
        ]:  # not splitlines: answers may hold other line breaks
            for entry in _entries(path, f"[{line}]", ("who", "said")):
                self.of(entry["who"])[entry["id"]] = entry["said"]
        if whole != content:
            with path.open("r+b") as file:
                file.truncate(len(whole))


def check(folder: Path, identity: Mapping[str, Any] | None = None) -> None:
    """Raise DataError where a folder holds something else than answers, or those of a run with
    another `identity`.
    """
    if folder.is_file():
        raise DataError(f"--output-dir: '{folder}' is a file")
    if not folder.is_dir() or all(
        path.name == _part_of(folder / RUN).name for path in folder.iterdir()
    ):
        return
    try:
        found = dict(json.loads((folder / RUN).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as problem:
        raise DataError(
            f"--output-dir: '{folder}' holds something else; give an empty or new folder"
        ) from problem
    if identity is None:
        return
    for name in sorted(identity):
        there, here = found.get(name), identity.get(name)
        if there != here:
            raise DataError(
                f"--output-dir: '{folder}' holds answers of another run "
                f"({name.replace('_', ' ')}: {there} there, {here} "
                "here); give another folder, or --overwrite"
            )


def make(folder: Path) -> None:
    """The folder, where it is not there yet. Raises DataError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise _cannot_write(folder, problem) from problem


def clear(folder: Path) -> None:
    """Remove a folder of answers. Raises DataError where it holds something else."""
    check(folder)
    try:
        if folder.is_dir():
            shutil.rmtree(folder)
    except OSError as problem:
        raise _cannot_write(folder, problem) from problem


def write_json(path: Path, data: Any) -> None:
    """Write under a temporary name, then rename: a reader never sees half a file."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Likewise, plain text. Raises DataError where it cannot be written."""
    part = _part_of(path)
    try:
        part.write_text(text, encoding="utf-8", errors="replace")
        part.rename(path)
    except OSError as problem:
        raise _cannot_write(path.parent, problem) from problem


def _part_of(path: Path) -> Path:
    """The temporary name that a file is written under."""
    return path.with_name(f".{path.name}.partial")


def _entries(path: Path, text: str, texts: Sequence[str] = ("said",)) -> list[dict[str, Any]]:
    try:
        entries: list[dict[str, Any]] = json.loads(text)
        good = all(
            isinstance(entry["id"], int) and all(isinstance(entry[t], str) for t in texts)
            for entry in entries
        )
    except (ValueError, KeyError, TypeError) as problem:
        raise DataError(
            f"'{path}' is damaged; remove it, or give --overwrite to ask anew"
        ) from problem
    if not good:
        raise DataError(f"'{path}' is damaged; remove it, or give --overwrite to ask anew")
    return entries


def _cannot_write(folder: Path, problem: OSError) -> DataError:
    return DataError(f"--output-dir: cannot write '{folder}': {problem.strerror or problem}")
