"""Votes as preference data: a JSONL with its images beside it, which `vlmdpo prepare` accepts."""

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

_IMAGES = "images"


def append(
    file: Path,
    *,
    image: Path,
    question: str,
    chosen: str,
    rejected: str,
    about: Mapping[str, Any],
) -> int:
    """Add one preference. Returns the number of lines in the file.

    The image is stored once, in a subfolder, under a hash of its bytes. Several servers may write
    at the same time.

    Args:
        image: the file that was asked about.
        about: other fields of the line, such as which answer was preferred.

    Raises:
        OSError: the folder cannot be written.
        BadImage: the image cannot be read.
    """
    stored = bounded(image.read_bytes(), None)
    kind = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}[stored.data[:2]]
    name = f"{_IMAGES}/{hashlib.sha256(stored.data).hexdigest()[:24]}.{kind}"
    line = {"image": name, "question": question, "chosen": chosen, "rejected": rejected, **about}
    line["voted_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    (file.parent / _IMAGES).mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(file.with_name(f".{file.name}.lock")):
        target = file.parent / name
        if not target.exists():
            part = target.with_name(f".{target.name}.partial")
            part.write_bytes(stored.data)
            part.replace(target)
        with file.open("ab+") as votes:
            votes.seek(0)
            content = votes.read()
            # A last line without a line break was cut short by a kill, and is not a vote.
            votes.truncate(content.rfind(b"\n") + 1)
            votes.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
            votes.flush()
            os.fsync(votes.fileno())
        return content.count(b"\n") + 1
