"""Votes as preference data: a JSONL with its images beside it, which `vlmdpo prepare` accepts.

Ties are no preferences and stand in a file of their own. Of several votes on one pair of answers
the last one stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock

from vlmdpo.benchmarks.stats import Interval, wilson
from vlmdpo.data.images import bounded

_IMAGES = "images"
_Key = tuple[str, str, frozenset[str]]


@dataclass(frozen=True)
class Tally:
    """The votes on two models.

    Attributes:
        base, tuned: votes for either.
        ties, neither: votes for none of them.
    """

    base: int = 0
    tuned: int = 0
    ties: int = 0
    neither: int = 0

    @property
    def decided(self) -> int:
        """Votes for one of the two."""
        return self.base + self.tuned

    @property
    def win_rate(self) -> tuple[float, Interval] | None:
        """How many of the decided votes are for tuned, in per cent, with a 95% interval."""
        if not self.decided:
            return None
        return 100 * self.tuned / self.decided, wilson(self.tuned, self.decided)


class VoteFile:
    """The votes on two models in a file that several servers may write at the same time.

    Args:
        file: of the preferences; ties are in a file beside it.
        names: of base and tuned model.
    """

    def __init__(self, file: Path, names: tuple[str, str]) -> None:
        self.file, self.names = file, names
        self.ties = file.with_name(f"{file.stem}.ties{file.suffix or '.jsonl'}")

    def cast(
        self, image: Path, question: str, pairs: Sequence[tuple[str, str]], preferred: str
    ) -> str:
        """Write a vote, and remove earlier ones on the same answers. Returns its name.

        The image is stored once, in a subfolder, under a hash of its bytes.

        Args:
            image: the file that was asked about.
            pairs: (chosen, rejected), in one vote.
            preferred: "base", "tuned", "neither" or "tie".

        Raises:
            OSError: the folder cannot be written.
            BadImage: the image cannot be read.
        """
        name, data = stored_image(image)
        vote = secrets.token_hex(6)
        about = {
            **{"preferred": preferred, "base": self.names[0], "tuned": self.names[1]},
            **{"vote": vote, "voted_at": datetime.now(UTC).isoformat(timespec="seconds")},
        }
        lines: list[dict[str, Any]] = [
            {"image": name, "question": question, "chosen": chosen, "rejected": rejected, **about}
            for chosen, rejected in pairs
        ]
        if preferred == "tie":
            for line in lines:
                line["answers"] = [line.pop("chosen"), line.pop("rejected")]
        superseded = {_key(line) for line in lines}
        with self._locked():
            _store(self.file.parent / name, data)
            for file in (self.file, self.ties):
                added = lines if (file == self.ties) == (preferred == "tie") else []
                _rewrite(file, lambda line: _key(line) not in superseded, added)
        return vote

    def retract(self, vote: str) -> None:
        """Remove a vote. Raises OSError."""
        with self._locked():
            for file in (self.file, self.ties):
                _rewrite(file, lambda line: line.get("vote") != vote, ())

    def tally(self) -> Tally:
        """The votes so far, of every server."""
        lines = [line for file in (self.file, self.ties) for _, line in _read(file)]
        lines = [line for line in lines if (line.get("base"), line.get("tuned")) == self.names]
        # A vote for neither makes two lines.
        votes = {line.get("vote") or f"line {at}": line for at, line in enumerate(lines)}
        count = [line.get("preferred") for line in votes.values()].count
        return Tally(count("base"), count("tuned"), count("tie"), count("neither"))

    def preferences(self) -> int:
        """Lines of the preference file."""
        return len(_read(self.file))

    def asked(self) -> set[tuple[str, str]]:
        """(stored name of the image, question) of what was voted on."""
        lines = [line for file in (self.file, self.ties) for _, line in _read(file)]
        return {(str(line.get("image")), str(line.get("question"))) for line in lines}

    def _locked(self) -> filelock.BaseFileLock:
        (self.file.parent / _IMAGES).mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(self.file.with_name(f".{self.file.name}.lock"))


def stored_image(image: Path) -> tuple[str, bytes]:
    """(name relative to the vote file, bytes) of an image as it is stored. Raises BadImage."""
    stored = bounded(image.read_bytes(), None)
    kind = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}[stored.data[:2]]
    return f"{_IMAGES}/{hashlib.sha256(stored.data).hexdigest()[:24]}.{kind}", stored.data


def _key(line: Mapping[str, Any]) -> _Key:
    """What a vote is about: image, question, and both answers in any order."""
    answers = line.get("answers") or (line.get("chosen"), line.get("rejected"))
    return str(line.get("image")), str(line.get("question")), frozenset(map(str, answers))


def _read(file: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each line as it stands, and parsed; {} for one that another program wrote.

    A last line without a line break was cut short by a kill, and is not a vote.
    """
    if not file.exists():
        return []
    found = []
    for line in file.read_bytes().split(b"\n")[:-1]:
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError):
            parsed = {}
        if line.strip():
            found.append((line, parsed if isinstance(parsed, dict) else {}))
    return found


def _rewrite(
    file: Path, keeps: Callable[[dict[str, Any]], bool], added: Iterable[Mapping[str, Any]]
) -> None:
    """Write the lines that `keeps` holds for, and then the new ones, as a whole or not at all."""
    before = _read(file)
    kept = [line for line, parsed in before if keeps(parsed)]
    new = [
        json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") for line in added
    ]
    if not new and len(kept) == len(before):
        return
    part = file.with_name(f".{file.name}.partial")
    with part.open("wb") as votes:
        votes.write(b"".join(line + b"\n" for line in (*kept, *new)))
        votes.flush()
        os.fsync(votes.fileno())
    part.replace(file)


def _store(target: Path, data: bytes) -> None:
    if not target.exists():
        part = target.with_name(f".{target.name}.partial")
        part.write_bytes(data)
        part.replace(target)
