"""Examples to ask about: answers that changed in an evaluation, rows of the run, the user's own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from vlmdpo.benchmarks.amber import questions as qs
from vlmdpo.data import store
from vlmdpo.data.images import BadImage, inside, open_file
from vlmdpo.errors import DataError
from vlmdpo.report.html import evenly

SCORES = "scores.json"
_PER_SOURCE = 12  # examples of each source


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
    except (OSError, ValueError, KeyError) as problem:
        raise DataError(
            f"--amber: '{folder}' was not written by vlmdpo eval-amber: {problem}"
        ) from problem
    benchmark = (
        qs.load(Path(data), Path(images) if images else Path(data) / "image", generative=False)
        if data
        else None
    )
    return from_flips(evenly(flips, _PER_SOURCE), image_folder, benchmark, "changed in eval-amber")


def from_flips(
    flips: Sequence[Any], folder: Path, benchmark: qs.Benchmark | None, source: str
) -> list[Example]:
    """Questions about a benchmark's images, or the embedded set's. Missing images are left out."""
    from vlmdpo.tiny import evaluation

    examples = []
    for flip in flips:
        try:
            image = (
                benchmark.open_image(flip["image"])
                if benchmark
                else evaluation.draw_image(flip["image"])
            )
        except DataError:  # AMBER's images may have been moved since
            continue
        path = folder / f"{Path(flip['image']).stem}.png"
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


def from_file(file: Path, root: Path) -> list[Example]:
    """The user's own: JSON lines with image and question. Raises DataError, naming the line."""
    return list(islice(_lines(file, root), 200))


def _lines(file: Path, root: Path) -> Iterator[Example]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(
            f"--examples: cannot read '{file}': {getattr(problem, 'strerror', None) or problem}"
        ) from problem
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"--examples: '{file}' line {number}"
        try:
            entry = json.loads(line)
            path = inside(root, str(entry["image"]))
            open_file(path)
            yield Example(path, str(entry["question"]), file.name)
        except (ValueError, KeyError, TypeError) as problem:
            raise DataError(f"{where} must be a JSON object with image and question") from problem
        except BadImage as problem:
            raise DataError(f"{where}: {problem}") from problem
