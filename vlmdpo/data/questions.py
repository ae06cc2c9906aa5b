"""A JSONL of questions about images. A line that cannot be asked is left out, and counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlmdpo import ui
from vlmdpo.data import json_rows
from vlmdpo.data.image_cells import inside
from vlmdpo.data.images import open_file
from vlmdpo.data.left_out import LeftOut, in_words
from vlmdpo.data.pairs import question_message
from vlmdpo.data.reasons import BadImage, BadRow, missing, shown
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
        except BadRow as problem:
            left_out.add(f"line {number}", problem)
    if not questions:
        raise nothing_to_ask(path, root, left_out, flag)
    return list(questions.values()), left_out


def nothing_to_ask(path: Path, root: Path, left_out: LeftOut, flag: str) -> DataError:
    """The error of a file of which nothing can be asked, with the reasons."""
    if not left_out:
        return DataError(f"{flag}: '{path}' contains no questions")
    reasons = in_words(left_out.report())
    hint = f"; images are looked for in '{root}', see --image-root"
    return DataError(
        f"{flag}: of {ui.count(len(left_out), 'question')} of '{path}' none can be asked: {reasons}"
        f"{hint if 'missing_image' in left_out.by_reason else ''}"
    )


def _parse(line: bytes, number: int, root: Path) -> Question:
    """A line as a question. Raises BadRow, BadImage."""
    try:
        entry = json_rows.parse(line.decode("utf-8"))
    except UnicodeDecodeError as problem:
        raise BadRow("bad_utf8", str(problem)) from problem
    except ValueError as problem:
        raise BadRow("bad_json", str(problem)) from problem
    if not isinstance(entry, dict):
        raise BadRow("not_an_object", f"a line must be a JSON object, not {shown(entry)}")
    absent = [name for name in ("image", "question") if missing(entry.get(name))]
    if absent:
        found = ", ".join(map(str, entry)) or "nothing"
        raise BadRow(
            f"missing_{absent[0]}", f"a line must hold image and question; found {found[:80]}"
        )
    image, text = entry["image"], entry["question"]
    if not isinstance(image, str):
        raise BadImage("unreadable_image", f"image is {type(image).__name__}, not a path")
    path = inside(root, image)
    try:
        is_file = path.is_file()
    except OSError as problem:  # a name that is too long
        raise BadImage("missing_image", f"{shown(image)}: {problem.strerror}") from problem
    if not is_file:
        raise BadImage("missing_image", f"{shown(image)} was not found in '{root}'")
    question_message(text)
    return Question(f"line {number}", _id(entry.get("id"), number), image, text, path)


def _id(value: Any, number: int) -> str | int:
    """The id of a line, or its number. Tables write whole numbers as 3.0."""
    if missing(value):
        return number
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise BadRow("unknown_id", f"id is {shown(value)}, not a text or whole number")
    return value
