"""Examples to ask about: answers that changed in an evaluation, rows of the run, the user's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdpo.benchmarks.image_folder import ImageFolder
from vlmdpo.data import questions, store
from vlmdpo.data.left_out import LeftOut
from vlmdpo.data.reasons import BadImage
from vlmdpo.errors import DataError
from vlmdpo.report.html import evenly

SCORES = "scores.json"
_PER_SOURCE = 12  # examples of each source
_MOST_OF_FILE = 200  # examples of the user's own file


@dataclass(frozen=True)
class Example:
    """An image file, a question, and where they come from."""

    image: Path
    question: str
    source: str


def from_amber(folder: Path, image_folder: Path) -> list[Example]:
    """Answers that changed between base and tuned in a folder of `eval-amber`. Raises DataError."""
    try:
        report = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        flips = (report["comparison"] or {}).get("flips", [])
        data, images = report["settings"]["data"], report["settings"]["images"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise DataError(
            f"--amber: '{folder}' was not written by vlmdpo eval-amber: {problem}"
        ) from problem
    root = ImageFolder(Path(images or Path(data) / "image"), "AMBER") if data else None
    return from_flips(evenly(flips, _PER_SOURCE), image_folder, root, "changed in eval-amber")


def from_flips(
    flips: Sequence[Any], folder: Path, images: ImageFolder | None, source: str
) -> list[Example]:
    """Questions about a benchmark's images, or the embedded set's. Missing images are left out."""
    from vlmdpo.tiny import evaluation

    examples = []
    for number, flip in enumerate(flips):
        try:
            image = images.open(flip["image"]) if images else evaluation.draw_image(flip["image"])
        except DataError:  # AMBER's images may have been moved since
            continue
        path = folder / f"changed-{number}.png"
        image.save(path)
        examples.append(Example(path, flip["question"], source))
    return examples


def from_run(adapter: Path, folder: Path) -> list[Example]:
    """Rows of the data that an adapter was trained on, of its test split if it has one."""
    try:
        data = Path(json.loads((adapter / "train_report.json").read_text(encoding="utf-8"))["data"])
    except (OSError, ValueError, KeyError, TypeError):  # an adapter from elsewhere
        return []
    if store.read_manifest(data) is None:
        return []
    split = "test" if store.has_test_split(data) else "train"
    rows = store.load(data, split)
    examples = []
    for number in evenly(range(len(rows)), _PER_SOURCE):
        row = rows[number]
        texts = [
            part["text"] for turn in row["prompt"] for part in turn["content"] if part.get("text")
        ]
        # The page asks one question about one image.
        if len(row["images"]) == 1 and len(row["prompt"]) == 1:
            path = folder / f"row-{number}.png"
            row["images"][0].save(path)
            examples.append(Example(path, " ".join(texts), f"{split} split of the run"))
    return examples


def from_file(file: Path, root: Path) -> tuple[list[Example], LeftOut]:
    """The user's own: JSON lines with image and question, and the lines that cannot be used.

    Raises DataError for a file that cannot be read, or has no line that can be used.
    """
    flag = "--examples"
    found, left_out = questions.read(file, root, flag)
    examples = []
    for question in found[:_MOST_OF_FILE]:
        try:
            question.open_image()
        except BadImage as problem:
            left_out.add(question.row, problem)
        else:
            examples.append(Example(question.path, question.text, file.name))
    if not examples:
        raise questions.nothing_to_ask(file, root, left_out, flag)
    return examples, left_out
