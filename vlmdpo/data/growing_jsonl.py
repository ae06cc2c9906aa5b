"""A JSONL file that grows while results come, and survives a kill.

Each of several processes writes a part of its own, which is appended to the file when all are done.
A line that was cut short is removed. All functions raise OSError.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def part(path: Path, process: int) -> Path:
    """Where one of several processes writes its lines."""
    return path.with_name(f".{path.name}.part-{process}")


def collect(path: Path) -> None:
    """Append the complete lines of all parts to the file, and remove the parts.

    A kill in between loses nothing: the same lines may be there twice then.
    """
    parts = sorted(path.parent.glob(f".{path.name}.part-*"))
    if not parts:
        return
    files = [*([path] if path.exists() else []), *parts]
    rewrite(path, [line for file in files for line in complete_lines(file)])
    for one in parts:
        one.unlink()


def complete_lines(path: Path) -> list[str]:
    """The lines that end in a line break."""
    content = path.read_bytes()  # whose end may be half a character
    complete = content[: content.rfind(b"\n") + 1].decode("utf-8")
    # Not splitlines: texts may hold other line breaks, such as U+2028.
    return complete.split("\n")[:-1]


def rewrite(path: Path, lines: Sequence[str]) -> None:
    """Replace the file, unless it holds just these lines."""
    content = "".join(line + "\n" for line in lines).encode()
    if not path.exists() or path.read_bytes() != content:
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_bytes(content)
        temporary.replace(path)


def sort(path: Path, ids: Sequence[object]) -> None:
    """Bring the lines into the order of these `id`s; unknown ones come first."""
    if path.exists():
        by_id = {json.loads(line)["id"]: line for line in complete_lines(path)}
        known = [by_id.pop(one) for one in ids if one in by_id]
        rewrite(path, [*by_id.values(), *known])
