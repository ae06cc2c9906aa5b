"""POPE's and RePOPE's files: questions, and answers in POPE's form. Knows no rule of scoring."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.benchmarks import files
from vlmdpo.benchmarks.base import Id, Question, Responses
from vlmdpo.config.evaluate import SPLITS
from vlmdpo.errors import DataError

_POPE_QUESTIONS = 3000  # of each split, with ids from 1
_REPOPE_QUESTIONS = {"random": 2774, "popular": 2727, "adversarial": 2684}
_OLD_RANDOM = 2910  # POPE's first copy of the split, still in use elsewhere
_MISSPELLED = "imange"  # in questions of older copies
# A hash of the published ids, images and questions of POPE's splits.
_PUBLISHED = {
    "6cf0610aea691911": "random",
    "0b1eb574a2a8722e": "popular",
    "b781ad126fa51785": "adversarial",
}


@dataclass(frozen=True)
class Found:
    """The questions of some splits.

    Attributes:
        notes: how the files differ from the published ones.
        all_ids: by split, the ids that answers may have.
        is_published: whether all splits are there and as published.
    """

    questions: tuple[Question, ...]
    notes: tuple[str, ...]
    all_ids: Mapping[str, Sequence[int]]
    digest: str
    is_published: bool


def read(folder: Path, kind: str, splits: Sequence[str]) -> Found:
    """The question files of a folder.

    Args:
        kind: "pope" or "repope".
        splits: those wanted; none means all three.

    Raises DataError.
    """
    files.require_folder(folder)
    wanted = [split for split in SPLITS if split in splits] or list(SPLITS)
    questions: list[Question] = []
    notes: list[str] = []
    all_ids: dict[str, Sequence[int]] = {}
    for split in wanted:
        path = _file_of(folder, kind, split)
        rows = list(_rows(path))
        notes += _check(path, kind, split, rows)
        questions += [
            Question(f"{split}/{r['question_id']}", r["image"], r["text"], r["label"], split)
            for r in rows
        ]
        is_pope = kind == "pope"
        all_ids[split] = (
            [r["question_id"] for r in rows] if is_pope else range(1, _POPE_QUESTIONS + 1)
        )
    names = [_file_of(folder, kind, split).name for split in wanted]
    return Found(
        tuple(questions),
        tuple(notes),
        all_ids,
        files.digest(folder, names),
        is_published=not notes and len(wanted) == len(SPLITS),
    )


def _file_of(folder: Path, kind: str, split: str) -> Path:
    """A split's file: by its own name, or the only JSON file with the split's name."""
    named = folder / f"coco_{kind}_{split}.json"
    if named.is_file():
        return named
    found = [path for path in sorted(folder.glob(f"*{split}*.json*")) if path.is_file()]
    if len(found) != 1:
        several = f"; {', '.join(f.name for f in found)} may be it" if found else ""
        raise DataError(
            f"--data: '{folder}' has no {named.name}{several}; leave the split out with --split, "
            "or name the folder of the question files"
        )
    return found[0]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a question file. Raises DataError."""
    ids = set()
    for line, row in files.json_lines(path):
        where = f"'{path}' line {line}"
        files.require(row, {"question_id": int, "image": str, "text": str, "label": str}, where)
        if row["label"] not in ("yes", "no"):
            raise DataError(
                f"{where}: label must be yes or no, not {row['label']!r}; POPEv2 is another "
                "benchmark"
            )
        if row["question_id"] in ids:
            raise DataError(f"{where}: question {row['question_id']} is there twice")
        ids.add(row["question_id"])
        yield row
    if not ids:
        raise DataError(f"'{path}' holds no questions")


def _check(path: Path, kind: str, split: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How a split's questions differ from the published ones. Raises DataError for those of
    another benchmark or split.
    """
    count = len(rows)
    repope_split = {number: name for name, number in _REPOPE_QUESTIONS.items()}.get(count)
    if kind == "pope" and repope_split:
        raise DataError(
            f"'{path}' has {count:,} questions, as RePOPE's {repope_split} split: use --benchmark "
            "repope"
        )
    if kind == "repope" and count == _POPE_QUESTIONS:
        raise DataError(
            f"'{path}' has {count:,} questions, as POPE's own files; RePOPE's {split} split has "
            f"{_REPOPE_QUESTIONS[split]:,}: use --benchmark pope, or name the folder of RePOPE's "
            "label files"
        )
    published = _PUBLISHED.get(_digest(rows)) if kind == "pope" else repope_split
    if published not in (split, None):
        raise DataError(f"'{path}' holds the questions of the {published} split, not of {split}")
    if published == split:
        return []
    misspelled = sum(_MISSPELLED in row["text"] for row in rows)
    if misspelled or (split == "random" and count == _OLD_RANDOM):
        return [
            f"'{path.name}' is an old copy ({count:,} questions, {misspelled:,} with "
            f'"{_MISSPELLED}"): its figures are not those of today\'s files'
        ]
    expected = _POPE_QUESTIONS if kind == "pope" else _REPOPE_QUESTIONS[split]
    return [
        f"'{path.name}' is not the published {split} split: ids, images or texts differ"
        if count == expected
        else f"'{path.name}' has {count:,} questions; the published {split} split has {expected:,}"
    ]


def _digest(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = (f"{row['question_id']} {row['image']} {row['text']}" for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def read_answers(
    path: Path, split: str, questions: Sequence[Question], all_ids: Sequence[int]
) -> Responses:
    """The answers of a file to one split, in its order.

    Without ids, the n-th answer is to the n-th question, as POPE's scorer has it; their number must
    then be that of the questions, of this benchmark or of POPE itself.

    Raises DataError.
    """
    if files.read_text(path).lstrip().startswith("["):
        return _own_form(path, {question.id for question in questions}, split, all_ids)
    rows = list(files.json_lines(path))
    for line, row in rows:
        files.require(row, {"answer": str}, f"'{path}' line {line}")
    having_ids = [row for _, row in rows if "question_id" in row]
    if having_ids and len(having_ids) < len(rows):
        raise DataError(
            f"'{path}': {len(having_ids):,} of {len(rows):,} answers have a question_id; all or "
            "none must"
        )
    if having_ids:
        return _joined(
            path, rows, split, {question.id: question for question in questions}, all_ids
        )
    for ids in ([question.id for question in questions], [f"{split}/{n}" for n in all_ids]):
        if len(ids) == len(rows):
            known = {question.id for question in questions}
            return [
                (number, row["answer"])
                for number, (_, row) in zip(ids, rows, strict=True)
                if number in known
            ]
    raise DataError(
        f"'{path}' has {ui.count(len(rows), 'answer')} without question_id, and the {split} split "
        f"{ui.count(len(questions), 'question')}: which is the answer to which cannot be told"
    )


def _joined(
    path: Path,
    rows: Sequence[tuple[int, Mapping[str, Any]]],
    split: str,
    questions: Mapping[Id, Question],
    all_ids: Sequence[int],
) -> Responses:
    """Answers with ids, to the questions that are asked."""
    known = set(all_ids)
    found = []
    for line, row in rows:
        where = f"'{path}' line {line}"
        files.require(row, {"question_id": int}, where)
        number = row["question_id"]
        if number not in known:
            raise DataError(_no_such(where, number, split))
        question = questions.get(f"{split}/{number}")
        if question is None:
            continue
        asked = row.get("question")
        if isinstance(asked, str) and not _is_same(asked, question.text):
            raise DataError(
                f"{where}: question {number} is {asked[:80]!r} here and {question.text!r} in the "
                f"{split} split: these are answers to another split or benchmark"
            )
        found.append((question.id, row["answer"]))
    return found


def _is_same(one: str, other: str) -> bool:
    """Whether two texts ask the same, whatever is added to one of them."""
    return one.strip() in other or other in one


def _own_form(path: Path, asked: set[Id], split: str, all_ids: Sequence[int]) -> Responses:
    """The answers that `vlmdpo eval` keeps: a list of {id, response}, of any splits."""
    known = {f"{split}/{number}" for number in all_ids}
    found: list[tuple[Id, str]] = []
    for number, entry in enumerate(files.read_json(path)):
        where = f"'{path}' entry {number} (counted from 0)"
        if not isinstance(entry, dict):
            raise DataError(f"{where} must be a JSON object with id and response")
        files.require(entry, {"id": str, "response": str}, where)
        if entry["id"].split("/")[0] == split and entry["id"] not in known:
            raise DataError(_no_such(where, entry["id"], split))
        if entry["id"] in asked:
            found.append((entry["id"], entry["response"]))
    return found


def _no_such(where: str, number: object, split: str) -> str:
    return (
        f"{where}: there is no question {number} in the {split} split; are these answers to "
        "another split or benchmark?"
    )
