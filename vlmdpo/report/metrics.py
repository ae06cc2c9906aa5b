"""The metrics of a training as it logs them: a JSON line for each time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmdpo.errors import DataError

METRICS_FILE = "metrics.jsonl"
GO_ON_WITHOUT = "remove it to go on without what was logged before"  # to one who resumes a run


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


def read_lines(path: Path, advice: str) -> list[dict[str, Any]]:
    """The complete lines of such a file; none if there is no file.

    Args:
        advice: what to do about a damaged file, for the message.

    Raises DataError for a line that is not an object with a step.
    """
    if not path.exists():
        return []
    try:
        # A last line without its end was cut off by a kill.
        complete, newline, _ = path.read_bytes().decode("utf-8").rpartition("\n")
    except UnicodeDecodeError as problem:
        raise DataError(f"'{path}' is damaged ({problem}); {advice}") from problem
    texts = complete.split("\n") if newline else []
    return [
        _parsed(text, f"'{path}' line {number}", advice)
        for number, text in enumerate(texts, start=1)
    ]


def _parsed(text: str, where: str, advice: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as problem:
        # Not its place, which counts from this line as if it were the first.
        why = problem.msg if isinstance(problem, json.JSONDecodeError) else problem
        raise DataError(f"{where} is damaged ({why}); {advice}") from problem
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        raise DataError(f"{where} is damaged (it has no step); {advice}")
    return line
