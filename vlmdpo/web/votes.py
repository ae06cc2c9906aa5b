"""Votes as preference data: a JSONL with its pictures beside it, which `vlmdpo prepare` takes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock

from vlmdpo.data.images import bounded

_PICTURES = "images"


def append(
    file: Path,
    *,
    picture: Path,
    question: str,
    chosen: str,
    rejected: str,
    about: Mapping[str, Any],
) -> int:
    """Add one preference; returns how many lines the file now has.

    The picture is stored below the file's folder under a hash of its bytes, once. Several servers
    may write at once.

    Args:
        picture: the file that was asked about.
        about: what else shall stand in the line, such as whose answer was chosen.

    Raises:
        OSError: the folder cannot be written.
        BadImage: the picture is none.
    """
    stored = bounded(picture.read_bytes(), None)
    kind = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}[stored.data[:2]]
    name = f"{_PICTURES}/{hashlib.sha256(stored.data).hexdigest()[:24]}.{kind}"
    line = {"image": name, "question": question, "chosen": chosen, "rejected": rejected, **about}
    line["voted_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    (file.parent / _PICTURES).mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(file.with_name(f".{file.name}.lock")):
        target = file.parent / name
        if not target.exists():
            part = target.with_name(f".{target.name}.partial")
            part.write_bytes(stored.data)
            part.replace(target)
        with file.open("ab+") as votes:
            votes.seek(0)
            held = votes.read()
            votes.truncate(
                held.rfind(b"\n") + 1
            )  # a last line without end was cut by a kill, and is no vote
            votes.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
            votes.flush()
            os.fsync(votes.fileno())
        return held.count(b"\n") + 1
