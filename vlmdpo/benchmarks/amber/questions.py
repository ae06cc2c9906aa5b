"""AMBER's data: questions and descriptions joined to annotations by id, and response files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from vlmdpo.benchmarks import files
from vlmdpo.errors import DataError

# AMBER's type of a question → its dimension. Negative relations have the type "relation".
DIMENSION_OF = {
    "discriminative-hallucination": "Existence",
    "discriminative-attribute-state": "State",
    "discriminative-attribute-number": "Number",
    "discriminative-attribute-action": "Action",
    "discriminative-relation": "Relation",
    "relation": "Relation",
}
_FILES = (
    *("annotations.json", "query/query_discriminative.json", "query/query_generative.json"),
    *("relation.json", "safe_words.txt"),
)
_REAL_SIZE = (14216, 15220)  # discriminative questions and annotations of the public AMBER data


@dataclass(frozen=True)
class Question:
    """One yes/no question: `truth` is "yes" or "no", `dimension` a value of DIMENSION_OF."""

    id: int
    image: str
    text: str
    dimension: str
    truth: str


@dataclass(frozen=True)
class Description:
    """One image to describe: the things in it, and those that models often add (`hallu`)."""

    id: int
    image: str
    text: str
    truth: tuple[str, ...]
    hallu: tuple[str, ...]


@dataclass(frozen=True)
class Vocabulary:
    """AMBER's closed vocabulary: synonyms of each annotated word, and words that never count."""

    association: Mapping[str, tuple[str, ...]]
    safe: frozenset[str]

    @property
    def words(self) -> frozenset[str]:
        """Every annotated word and synonym."""
        return frozenset(self.association).union(*self.association.values())


@dataclass(frozen=True)
class AmberData:
    """What an AMBER data folder holds.

    Attributes:
        vocabulary: None if the folder lacks the generative half, or it was not wanted.
        is_amber: whether this is all of AMBER's public data.
        other_ids: annotated, but of a half that was not read; response files may contain them.
    """

    questions: tuple[Question, ...]
    descriptions: tuple[Description, ...]
    vocabulary: Vocabulary | None
    is_amber: bool
    digest: str
    other_ids: frozenset[int] = frozenset()


def read(folder: Path, *, generative: bool = True) -> AmberData:
    """Read an AMBER data folder, with its generative half if it has one and it is wanted.

    Raises DataError if questions and annotations do not join.
    """
    queries = _read_list(folder / "query" / "query_discriminative.json", ("id", "image", "query"))
    annotations = _read_list(folder / "annotations.json", ("id", "type", "truth"))
    by_id = {entry["id"]: entry for entry in annotations}
    if len(by_id) < len(annotations):
        raise DataError(f"'{folder}': annotations.json has an id twice")
    questions = tuple(_question(folder, query, by_id.get(query["id"])) for query in queries)
    if not questions:
        raise DataError(f"'{folder}': query/query_discriminative.json contains no questions")
    is_amber = (len(queries), len(annotations)) == _REAL_SIZE
    described = folder / "query" / "query_generative.json"
    vocabulary: Vocabulary | None = None
    descriptions: tuple[Description, ...] = ()
    if generative and described.is_file():
        vocabulary = _vocabulary(folder)
        asked = _read_list(described, ("id", "image", "query"))
        descriptions = tuple(
            _description(folder, query, by_id.get(query["id"]), vocabulary) for query in asked
        )
    asked_ids = {one.id for one in questions} | {one.id for one in descriptions}
    if len(asked_ids) < len(questions) + len(descriptions):
        raise DataError(f"'{folder}': two questions have the same id")
    others = frozenset(by_id) - asked_ids
    digest = files.digest(folder, _FILES)  # whichever half was read
    return AmberData(questions, descriptions, vocabulary, is_amber, digest, others)


def _question(
    folder: Path, query: Mapping[str, Any], annotation: Mapping[str, Any] | None
) -> Question:
    if annotation is None:
        raise DataError(f"'{folder}': question {query['id']} has no entry in annotations.json")
    if annotation["type"] not in DIMENSION_OF or annotation["truth"] not in ("yes", "no"):
        raise DataError(
            f"'{folder}': annotation {query['id']} is not of a yes/no question "
            f"(type {annotation['type']!r}, truth {annotation['truth']!r})"
        )
    return Question(
        query["id"],
        query["image"],
        query["query"],
        DIMENSION_OF[annotation["type"]],
        annotation["truth"],
    )


def _description(
    folder: Path,
    query: Mapping[str, Any],
    annotation: Mapping[str, Any] | None,
    vocabulary: Vocabulary,
) -> Description:
    if annotation is None or annotation["type"] != "generative":
        raise DataError(
            f"'{folder}': generative question {query['id']} has no generative entry in "
            "annotations.json"
        )
    truth, hallu = annotation["truth"], annotation.get("hallu")
    if not _is_words(truth) or not _is_words(hallu):
        raise DataError(
            f"'{folder}': annotation {query['id']} must hold lists of words as truth and hallu"
        )
    unknown = [word for word in (*truth, *hallu) if word not in vocabulary.association]
    if unknown:
        raise DataError(
            f"'{folder}': annotation {query['id']} names '{unknown[0]}', which is not in "
            "relation.json"
        )
    return Description(query["id"], query["image"], query["query"], tuple(truth), tuple(hallu))


def _is_words(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _vocabulary(folder: Path) -> Vocabulary:
    association = files.read_json(folder / "relation.json")
    if not isinstance(association, dict) or not all(
        _is_words(words) for words in association.values()
    ):
        raise DataError(f"'{folder / 'relation.json'}' must hold a JSON object of lists of words")
    safe = files.read_text(folder / "safe_words.txt").split("\n")
    return Vocabulary({word: tuple(words) for word, words in association.items()}, frozenset(safe))


def read_responses(path: Path) -> list[tuple[int, str]]:
    """(id, response) of a response file in AMBER's form, in order, with duplicates.

    Raises DataError.
    """
    responses = []
    for entry in _read_list(path, ("id", "response")):
        if not isinstance(entry["response"], str):
            raise DataError(
                f"'{path}': an entry must be {{'id': number, 'response': text}}, not "
                f"{str(entry)[:80]}"
            )
        responses.append((entry["id"], entry["response"]))
    return responses


def _read_list(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    loaded = files.read_json(path)
    if not isinstance(loaded, list):
        raise DataError(f"'{path}' must hold a JSON list of objects with {', '.join(keys)}")
    kinds = {"id": int, "image": str, "query": str, "type": str}
    for number, entry in enumerate(loaded):
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise DataError(f"'{path}' entry {number} (counted from 0) lacks {', '.join(missing)}")
        wrong = [key for key in keys if key in kinds and type(entry[key]) is not kinds[key]]
        if wrong:
            raise DataError(
                f"'{path}' entry {number} (counted from 0): {wrong[0]} cannot be "
                f"{entry[wrong[0]]!r}"[:300]
            )
    return loaded
