"""A JSONL of questions about images. A line that cannot be asked is left out, and counted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlmdpo.data.images import BadImage, inside, open_file
from vlmdpo.data.pairs import BadRow, check_text
from vlmdpo.data.row_errors import ROW_ERRORS, LeftOut, lines
from vlmdpo.errors import DataError


@dataclass(frozen=True)
class Question:
    """One line of a question file."""

    row: str  # as named in messages: "line 3"
    id: str | int
    image: str
    text: str
    path: Path

    def open_image(self) -> Image.Image:
        """The image, decoded. Raises BadImage."""
        return open_file(self.path)


def read(path: Path, root: Path, flag: str) -> tuple[list[Question], LeftOut]:
    """(the questions of the file that an option names, its lines that cannot be asked).

    Raises DataError for a file that cannot be read, or has no question that can be asked.
    """
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise DataError(f"{flag}: cannot read '{path}': {problem.strerror}") from problem
    questions: dict[str | int, Question] = {}
    left_out = LeftOut()
    # Not splitlines: texts may hold other line breaks, such as U+2028.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            question = _parse(line, number, root)
            if question.id in questions:
                first = questions[question.id].row
                raise BadRow("duplicate_id", f"the id {question.id!r} is that of {first}")
            questions[question.id] = question
        except ROW_ERRORS as problem:
            left_out.add(f"line {number}", problem, "unreadable_line")
    if not questions:
        raise nothing_to_ask(path, root, left_out, flag)
    return list(questions.values()), left_out


def nothing_to_ask(path: Path, root: Path, left_out: LeftOut, flag: str) -> DataError:
    """The error of a file of which nothing can be asked, with the reasons."""
    if not left_out:
        return DataError(f"{flag}: '{path}' contains no questions")
    reasons = "; ".join(lines(left_out.report()))
    hint = f"; images are looked for in '{root}', see --image-root"
    return DataError(
        f"{flag}: none of the {len(left_out):,} questions of '{path}' can be asked: {reasons}"
        f"{hint if 'missing_image' in left_out.by_reason else ''}"
    )


def _parse(line: bytes, number: int, root: Path) -> Question:
    """A line as a question. Raises BadRow, BadImage."""
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as problem:
        raise BadRow("not_utf8", str(problem)) from problem
    except (ValueError, RecursionError) as problem:
        raise BadRow("invalid_json", str(problem)) from problem
    if not isinstance(entry, dict):
        raise BadRow("not_an_object", f"a line must be a JSON object, not {type(entry).__name__}")
    missing = [name for name in ("image", "question") if entry.get(name) is None]
    if missing:
        found = ", ".join(map(str, entry))[:80] or "nothing"
        raise BadRow(f"missing_{missing[0]}", f"a line must hold image and question; found {found}")
    image = entry["image"]
    if not isinstance(image, str):
        raise BadImage("unreadable_image", f"image is {type(image).__name__}, not a path")
    path = inside(root, image)
    try:
        is_file = path.is_file()
    except OSError as problem:  # a name that is too long
        raise BadImage("missing_image", f"'{image[:80]}': {problem.strerror}") from problem
    if not is_file:
        raise BadImage("missing_image", f"'{image[:80]}' is no file in '{root}'")
    text = check_text(entry["question"], "question")
    return Question(f"line {number}", _id(entry.get("id"), number), image, text, path)


def _id(value: Any, number: int) -> str | int:
    """The id of a line, or its number. Tables write whole numbers as 3.0, and no value as NaN."""
    if value is None or (isinstance(value, float) and value != value):
        return number
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise BadRow("unknown_id", f"id is {type(value).__name__}, not a text or whole number")
    return value
