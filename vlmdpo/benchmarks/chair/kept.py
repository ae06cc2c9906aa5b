"""What was read from COCO's files, kept in a cache folder: reading them takes minutes.

Files are named by a digest of what they were made from, and hold one of their own content. One that
is damaged is reported, not used, and written anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmdpo import ui

FOLDER = "VLMDPO_CACHE"


def cache_folder() -> Path:
    """$VLMDPO_CACHE, or the folder `vlmdpo` in the user's cache folder."""
    named = os.environ.get(FOLDER)
    if named:
        return Path(named)
    parent = os.environ.get("XDG_CACHE_HOME")
    return (Path(parent) if parent else Path.home() / ".cache") / "vlmdpo"


def key(facts: Mapping[str, Any]) -> str:
    """A digest of everything that a kept file depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def read(name: str) -> dict[str, Any] | None:
    """The content of a kept file; None if it is missing or cannot be used."""
    path = cache_folder() / name
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):  # the latter: writing it will say so
        return None
    except (OSError, UnicodeDecodeError) as problem:
        _not_used(path, getattr(problem, "strerror", None) or str(problem))
        return None
    digest, _, content = text.partition("\n")
    if digest != _digest(content):
        _not_used(path, "its content does not match its digest")
        return None
    found: dict[str, Any] = json.loads(content)
    return found


def write(name: str, content: Mapping[str, Any]) -> None:
    """Keep a file, under a temporary name first. A folder that cannot be written gets a warning."""
    path = cache_folder() / name
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    partial = path.with_name(f".{name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(f"{_digest(text)}\n{text}", encoding="utf-8")
        partial.replace(path)
    except OSError as problem:
        with contextlib.suppress(OSError):  # as full or unwritable as it was a moment ago
            partial.unlink()
        ui.warn(
            f"what was read from COCO's files is not kept: cannot write '{path}': "
            f"{problem.strerror or problem}; name another folder with {FOLDER}"
        )


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _not_used(path: Path, why: str) -> None:
    ui.warn(f"'{path}' is not used and will be made anew: {why}")
