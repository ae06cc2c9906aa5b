"""The shapes that preference data comes in: how each is recognised by its columns, and turned into
a draft of a pair.

Adding a shape is one function and one line in SCHEMAS. The first one that recognises a source is
taken.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmdpo.data.pairs import BadRow, Draft
from vlmdpo.errors import DataError

Record = Mapping[str, Any]
IMAGE_COLUMNS = (
    "images",
    "image",
    "img_path",
    "image_path",
    "file_name",
    "jpg",
    "jpeg",
    "png",
    "webp",
)
TARGETS = ("image", "images", "question", "chosen", "rejected")  # what --map can name
_VIDEO_COLUMNS = ("video", "videos", "mp4", "avi", "webm")


@dataclass(frozen=True)
class Schema:
    """A shape of source rows: its name, the columns it reads, and how a row becomes a draft."""

    name: str
    columns: tuple[str, ...]
    draft: Callable[[Record], Draft]

    @property
    def line(self) -> str:
        """The schema as one line for people."""
        return f"{self.name} ({', '.join(self.columns)})"


def _images(row: Record) -> Any:
    value = next((row[column] for column in IMAGE_COLUMNS if row.get(column) is not None), None)
    if isinstance(value, str) and value.startswith('["'):  # a CSV cell can hold a list only as JSON
        with contextlib.suppress(ValueError):  # a file name, then
            return json.loads(value)
    return value


def _question(row: Record) -> Draft:
    return Draft(
        _images(row), row.get("question"), row.get("chosen"), row.get("rejected"), row.get("system")
    )


def _prompt(row: Record) -> Draft:
    return Draft(
        _images(row), row.get("prompt"), row.get("chosen"), row.get("rejected"), row.get("system")
    )


def _rlhf_v(row: Record) -> Draft:
    text = row.get("text")
    try:
        held = json.loads(text) if isinstance(text, str) else text
    except ValueError as problem:
        raise BadRow("bad_json", f"text is no valid JSON: {problem}") from problem
    if not isinstance(held, dict):
        raise BadRow(
            "bad_json",
            f"text holds {type(held).__name__}, not an object with question, chosen and rejected",
        )
    return Draft(_images(row), held.get("question"), held.get("chosen"), held.get("rejected"))


def _ranking(row: Record) -> Draft:
    """VLFeedback: several rated answers. The pair is the best and the worst by mean rating; a tie
    is no preference.
    """
    rated = [
        (_mean_rating(one.get("annotations")), one.get("response")) for one in _completions(row)
    ]
    known = [(rating, answer) for rating, answer in rated if rating is not None]
    if len(known) < 2:
        raise BadRow(
            "unrated", f"{len(known)} of {len(rated)} answers have a rating; a pair needs two"
        )
    best, worst = max(known, key=lambda one: one[0]), min(known, key=lambda one: one[0])
    if best[0] == worst[0]:
        raise BadRow("tied_ranking", f"all {len(known)} answers are rated {best[0]:g}")
    return Draft(_images(row), row.get("prompt"), best[1], worst[1])


def _completions(row: Record) -> list[dict[str, Any]]:
    held = row.get("completions")
    if isinstance(
        held, dict
    ):  # how `datasets` gives a sequence of structs: one list for each field
        return [dict(zip(held, values, strict=True)) for values in zip(*held.values(), strict=True)]
    if not isinstance(held, list) or not all(isinstance(one, dict) for one in held):
        raise BadRow(
            "unknown_message", f"completions holds {type(held).__name__}, not a list of answers"
        )
    return held


def _mean_rating(annotations: Any) -> float | None:
    """The mean over all aspects that hold a number; None where one says N/A or there is none."""
    ratings: list[float] = []
    for aspect in (annotations or {}).values():
        said: Any = aspect.get("Rating") if isinstance(aspect, dict) else aspect
        try:
            ratings.append(float(said))
        except (TypeError, ValueError):
            return None
    return sum(ratings) / len(ratings) if ratings else None


def _sharegpt(row: Record) -> Draft:
    """LLaMA-Factory's ranking: the conversation so far, and the next turn twice."""
    turns = (
        row.get("conversations") if row.get("conversations") is not None else row.get("messages")
    )
    return Draft(_images(row), turns, row.get("chosen"), row.get("rejected"), row.get("system"))


def _alpaca(row: Record) -> Draft:
    """LLaMA-Factory's alpaca ranking: an instruction and its input."""
    asked = "\n".join(text for text in (row.get("instruction"), row.get("input")) if text)
    return Draft(_images(row), asked, row.get("chosen"), row.get("rejected"), row.get("system"))


def _swift(row: Record) -> Draft:
    """ms-swift: a conversation that ends with the better answer; the worse one, or its whole
    conversation, beside it.
    """
    turns = list(row.get("messages") or [])
    if not turns:
        raise BadRow("empty_prompt", "messages is empty")
    if row.get("rejected_images") not in (None, [], row.get("images")):
        raise BadRow(
            "other_images_for_rejected", "chosen and rejected are about different pictures"
        )
    if row.get("rejected_messages"):
        return Draft(_images(row), None, turns, list(row["rejected_messages"]))
    return Draft(_images(row), turns[:-1], turns[-1], row.get("rejected_response"))


def _llava_outputs(row: Record) -> Draft:
    """LLaVA-RLHF: a conversation, two outputs, and which of them (1 or 2) people preferred."""
    outputs = (row.get("output_1"), row.get("output_2"))
    preferred = row.get("preference")
    if preferred not in (1, 2):
        raise BadRow("tied_ranking", f"preference is {preferred!r}, not 1 or 2")
    return Draft(
        _images(row), row.get("conversations"), outputs[preferred - 1], outputs[2 - preferred]
    )


def _llava_twice(row: Record) -> Draft:
    """POVID: the whole conversation twice, with the better and with the worse answer."""
    return Draft(_images(row), None, row.get("conversations"), row.get("rejected_conversations"))


# (name, columns that must be there, columns that must not, draft)
_SHAPES: tuple[tuple[str, tuple[str, ...], Callable[[Record], Draft]], ...] = (
    ("ms-swift", ("messages", "rejected_response"), _swift),
    ("ms-swift", ("messages", "rejected_messages"), _swift),
    ("LLaMA-Factory sharegpt ranking", ("conversations", "chosen", "rejected"), _sharegpt),
    ("LLaMA-Factory sharegpt ranking", ("messages", "chosen", "rejected"), _sharegpt),
    ("LLaMA-Factory alpaca ranking", ("instruction", "chosen", "rejected"), _alpaca),
    ("LLaVA pairs", ("conversations", "output_1", "output_2", "preference"), _llava_outputs),
    ("LLaVA conversations", ("conversations", "rejected_conversations"), _llava_twice),
    ("VLFeedback ranking", ("prompt", "completions"), _ranking),
    ("RLAIF-V", ("question", "chosen", "rejected"), _question),
    ("TRL", ("prompt", "chosen", "rejected"), _prompt),
    ("TRL with implicit prompt", ("chosen", "rejected"), _prompt),
    ("RLHF-V", ("text", "image"), _rlhf_v),
)


def detect(columns: Iterable[str], record: Record, where: str) -> Schema:
    """The schema of a source, by its columns and one of its rows.

    Raises:
        DataError: no schema fits, or the source is about videos. Says which columns were found and
            how to map them.
    """
    found = list(dict.fromkeys([*columns, *record]))
    videos = [column for column in _VIDEO_COLUMNS if record.get(column)]
    if videos:
        raise DataError(
            f"{where}: column {videos[0]} holds videos; vlmdpo trains on pictures: sample frames "
            "to images first"
        )
    pictures = tuple(column for column in IMAGE_COLUMNS if column in found)[:1]
    for name, needed, draft in _SHAPES:
        if all(column in found for column in needed) and not (
            name == "RLHF-V" and not _holds_json(record.get("text"))
        ):
            return Schema(name, tuple(dict.fromkeys([*pictures, *needed])), draft)
    raise DataError(
        f"{where}: no known preference format in columns {', '.join(found) or '(none)'}; "
        "say which is which, as in --map image=photo,question=ask,chosen=good,rejected=bad"
    )


def _holds_json(text: Any) -> bool:
    return isinstance(text, dict) or (isinstance(text, str) and text.lstrip().startswith("{"))


def mapped(
    mapping: Mapping[str, str], columns: Iterable[str], record: Record, where: str
) -> Schema:
    """The schema that --map tells: TARGETS to columns, dots reaching into structs and lists.

    Raises:
        DataError: a column that is not there.
    """
    names = {target: mapping.get(target, target) for target in TARGETS}
    found = list(dict.fromkeys([*columns, *record]))
    for target, column in names.items():
        wanted = target in mapping or target in ("question", "chosen", "rejected")
        if wanted and column.split(".")[0] not in found:
            raise DataError(
                f"{where}: --map wants column '{column}' as {target}; found "
                f"{', '.join(found) or '(none)'}"
            )
    picture = names["images"] if "images" in mapping or "images" in found else names["image"]
    used = (picture, names["question"], names["chosen"], names["rejected"])
    return Schema("mapped", tuple(dict.fromkeys(used)), functools.partial(_mapped, used))


def _mapped(columns: tuple[str, ...], row: Record) -> Draft:
    return Draft(*(_reach(row, column) for column in columns))


def _reach(row: Any, path: str) -> Any:
    """The value at a dotted path: "answers.0.text". None where it leads nowhere."""
    if isinstance(row, Mapping) and path in row:
        return row[path]
    for step in path.split("."):
        if isinstance(row, Mapping):
            row = row.get(step)
        elif (
            isinstance(row, (list, tuple))
            and step.lstrip("-").isdigit()
            and -len(row) <= int(step) < len(row)
        ):
            row = row[int(step)]
        else:
            return None
    return row
