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
    for one in sorted(path.parent.glob(f".{path.name}.part-*")):
        before = complete_lines(path) if path.exists() else []
        rewrite(path, [*before, *complete_lines(one)])
        one.unlink()


def complete_lines(path: Path) -> list[str]:
    """The lines that end in a line break."""
    content = path.read_bytes()  # whose end may be half a character
    complete = content[: content.rfind(b"\n") + 1].decode("utf-8")
    # Not splitlines: texts may hold other line breaks, such as U+2028.
    return complete.split("\n")[:-1]


def rewrite(path: Path, lines: Sequence[str]) -> None:
    """Replace the file, unless it holds just these lines."""
    text = "".join(line + "\n" for line in lines)
    if not path.exists() or path.read_bytes() != text.encode():
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def sort(path: Path, ids: Sequence[object]) -> None:
    """Bring the lines into the order of these `id`s; unknown ones come first."""
    if path.exists():
        by_id = {json.loads(line)["id"]: line for line in complete_lines(path)}
        known = [by_id.pop(one) for one in ids if one in by_id]
        rewrite(path, [*by_id.values(), *known])
