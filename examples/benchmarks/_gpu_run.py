"""Runs the items of the GPU check in order, within a time, and keeps every result as it comes.

Knows nothing of GPUs or models.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TRACEBACK_LINES = 25


class NotHere(Exception):
    """Why an item cannot run on this machine: a package or a device is missing."""


@dataclass(frozen=True)
class Item:
    """One measurement.

    Attributes:
        seconds: what it is expected to take; it does not begin with less time left.
        keeps: whether the item after it may use what it built.
    """

    name: str
    seconds: float
    run: Callable[[], dict[str, Any]]
    keeps: bool = False


class Results:
    """The results so far, by item, in a JSON file that is whole at any time.

    Args:
        path: the file; what it holds is kept.
        toy: whether results are of tiny models; a file never mixes the two.
    """

    def __init__(self, path: Path, *, toy: bool) -> None:
        self.path = path
        self.data: dict[str, Any] = {"toy": toy, "items": {}}
        if path.is_file():
            self.data = json.loads(path.read_text(encoding="utf-8"))
            if self.data["toy"] != toy:
                kind = "a toy run" if self.data["toy"] else "a real run"
                raise SystemExit(
                    f"--output: '{path}' holds {kind}; give another file, or delete this one"
                )

    @property
    def items(self) -> dict[str, Any]:
        found: dict[str, Any] = self.data["items"]
        return found

    def is_done(self, name: str) -> bool:
        """Whether an item has its result. What failed or could not run is tried again."""
        return self.items.get(name, {}).get("status") == "done"

    def put(self, name: str, entry: dict[str, Any]) -> None:
        """Keep an item's result, on the disk at once."""
        self.items[name] = entry
        partial = self.path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(self.data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)


def run_items(
    items: Sequence[Item],
    results: Results,
    seconds_left: Callable[[], float],
    clean_up: Callable[[], object],
) -> None:
    """Run what has no result yet. An item that fails is recorded, and the next one goes on.

    Args:
        clean_up: frees what an item left, after each that does not keep it for the next.
    """
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    for item in items:
        if results.is_done(item.name):
            say(f"{item.name}: has a result")
            continue
        if seconds_left() < item.seconds:
            say(
                f"{item.name}: left out, it takes {item.seconds:.0f} s of {seconds_left():.0f} left"
            )
            continue
        say(f"{item.name} ...")
        started = time.monotonic()
        entry = _entry(item)
        entry["seconds"] = round(time.monotonic() - started, 2)
        results.put(item.name, entry)
        say(f"{item.name}: {entry['status']} in {entry['seconds']:.1f} s {entry.get('error', '')}")
        if not item.keeps or entry["status"] != "done":
            clean_up()


def _entry(item: Item) -> dict[str, Any]:
    """An item's result, or how it failed. No exception lives on: it would hold the GPU's memory."""
    try:
        return {"status": "done", "result": item.run()}
    except NotHere as reason:
        return {"status": "not here", "error": str(reason)}
    # Whatever goes wrong in one item is kept as its result and must not cost the others theirs.
    except Exception as problem:  # noqa: BLE001
        lines = traceback.format_exc().splitlines()
        return {
            "status": "failed",
            "error": f"{type(problem).__name__}: {str(problem).strip()[:500]}",
            "traceback": lines[-_TRACEBACK_LINES:],
        }
