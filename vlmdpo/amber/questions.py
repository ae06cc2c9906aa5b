"""AMBER's data: questions joined to their annotations by id, and response files. No models, no scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlmdpo.data.images import BadImage, inside, open_whole, to_rgb
from vlmdpo.errors import DataError

# The dimension of a question by its AMBER type. A negative relation is typed plain "relation" in AMBER's data.
DIMENSION_OF = {
    "discriminative-hallucination": "Existence",
    "discriminative-attribute-state": "State",
    "discriminative-attribute-number": "Number",
    "discriminative-attribute-action": "Action",
    "discriminative-relation": "Relation",
    "relation": "Relation",
}
_REAL_SIZE = (14216, 15220)  # discriminative questions and annotations of the public AMBER data


@dataclass(frozen=True)
class Question:
    """One yes/no question. `truth` is "yes" or "no"; `dimension` one of DIMENSION_OF's values."""

    id: int
    image: str
    text: str
    dimension: str
    truth: str


@dataclass(frozen=True)
class Benchmark:
    """A question set, what opens its pictures, and whether it is AMBER's own public data, whole."""

    name: str
    questions: tuple[Question, ...]
    picture: Callable[[str], Image.Image]
    is_amber: bool
    generative_ids: frozenset[int]  # a response file may answer these too; the yes/no scores pass over them


def load(folder: Path, images: Path | None) -> Benchmark:
    """The discriminative half of an AMBER data folder. Raises DataError where it is incomplete or does not join."""
    queries = _read_list(folder / "query" / "query_discriminative.json", ("id", "image", "query"))
    annotations = _read_list(folder / "annotations.json", ("id", "type", "truth"))
    by_id = {entry["id"]: entry for entry in annotations}
    questions = []
    for query in queries:
        annotation = by_id.get(query["id"])
        if annotation is None:
            raise DataError(f"'{folder}': question {query['id']} has no entry in annotations.json")
        if annotation["type"] not in DIMENSION_OF or annotation["truth"] not in ("yes", "no"):
            raise DataError(
                f"'{folder}': annotation {query['id']} is no yes/no question "
                f"(type {annotation['type']!r}, truth {annotation['truth']!r})"
            )
        dimension = DIMENSION_OF[annotation["type"]]
        questions.append(Question(query["id"], query["image"], query["query"], dimension, annotation["truth"]))
    if not questions:
        raise DataError(f"'{folder}': query/query_discriminative.json holds no question")
    is_amber = (len(queries), len(annotations)) == _REAL_SIZE
    generative = frozenset(entry["id"] for entry in annotations if entry["type"] == "generative")
    name = "AMBER" if is_amber else folder.resolve().name
    return Benchmark(name, tuple(questions), _opener(images or folder / "image"), is_amber, generative)


def _opener(folder: Path) -> Callable[[str], Image.Image]:
    def picture(name: str) -> Image.Image:
        try:
            return to_rgb(open_whole(inside(folder, name).read_bytes()))
        except (OSError, BadImage) as problem:
            raise DataError(f"picture '{folder / name}' cannot be read: {problem}") from problem

    return picture


def need_pictures(questions: tuple[Question, ...], folder: Path) -> None:
    """Raise DataError, naming the first few, where a picture is missing: better now than an hour into the run."""
    if not folder.is_dir():
        raise DataError(f"no folder '{folder}' with AMBER's pictures; give it as --images DIR")
    missing = sorted({q.image for q in questions if not (folder / q.image).is_file()})
    if missing:
        raise DataError(
            f"'{folder}': {len(missing)} pictures are missing: {', '.join(missing[:5])}{' ...' if missing[5:] else ''}"
        )


def read_responses(path: Path) -> list[tuple[int, str]]:
    """(id, response) of a response file in AMBER's form, in its order, duplicates kept. Raises DataError."""
    responses = []
    for entry in _read_list(path, ("id", "response")):
        if not isinstance(entry["id"], int) or not isinstance(entry["response"], str):
            raise DataError(f"'{path}': an entry must be {{'id': number, 'response': text}}, not {str(entry)[:80]}")
        responses.append((entry["id"], entry["response"]))
    return responses


def _read_list(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise DataError(f"cannot read '{path}': {problem.strerror}") from problem
    except ValueError as problem:
        raise DataError(f"'{path}' is no valid JSON: {problem}") from problem
    if not isinstance(loaded, list):
        raise DataError(f"'{path}' must hold a JSON list of objects with {', '.join(keys)}")
    for number, entry in enumerate(loaded):
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise DataError(f"'{path}' entry {number} (counted from 0) lacks {', '.join(missing)}")
    return loaded
