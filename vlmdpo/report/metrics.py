"""The metrics of a training as it logs them: a JSON line for each time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmdpo.errors import DataError

METRICS_FILE = "metrics.jsonl"


def as_evaluation(line: dict[str, Any]) -> dict[str, Any]:
    """A line of the test split, with its metrics named as in training."""
    return {name.removeprefix("eval_"): value for name, value in line.items()}


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write a file of JSON lines, which gets its name once it is complete."""
    partial = path.with_suffix(".partial")
    partial.write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    partial.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of such a file; none if there is no file.

    Raises DataError for a line that is not an object with a step.
    """
    if not path.exists():
        return []
    try:
        # A last line without its end was cut off by a kill.
        complete, newline, _ = path.read_bytes().decode("utf-8").rpartition("\n")
        lines = [json.loads(line) for line in complete.split("\n")] if newline else []
        if not all(isinstance(line, dict) and isinstance(line["step"], int) for line in lines):
            raise ValueError("a line without a step")
    except (ValueError, KeyError, RecursionError) as problem:
        raise DataError(
            f"'{path}' is damaged ({problem}); remove it to go on without what was logged before"
        ) from problem
    return lines
