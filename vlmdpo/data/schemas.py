"""The formats of preference data: how each is recognized by its columns, and read.

A new format is one function and one line in `_FORMATS`. The first that recognizes a source is used.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmdpo.data.pairs import BadRow, UncheckedPair
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
    """A format: its name, the columns it reads, and how a row becomes an unchecked pair."""

    name: str
    columns: tuple[str, ...]
    unchecked_pair: Callable[[Record], UncheckedPair]

    @property
    def line(self) -> str:
        """The schema in one line."""
        return f"{self.name} ({', '.join(self.columns)})"


def _images(row: Record) -> Any:
    value = next((row[column] for column in IMAGE_COLUMNS if row.get(column) is not None), None)
    if isinstance(value, str) and value.startswith('["'):  # a CSV cell can hold a list only as JSON
        with contextlib.suppress(ValueError):  # a file name, then
            return json.loads(value)
    return value


def _question(row: Record) -> UncheckedPair:
    return UncheckedPair(
        _images(row), row.get("question"), row.get("chosen"), row.get("rejected"), row.get("system")
    )


def _prompt(row: Record) -> UncheckedPair:
    return UncheckedPair(
        _images(row), row.get("prompt"), row.get("chosen"), row.get("rejected"), row.get("system")
    )


def _rlhf_v(row: Record) -> UncheckedPair:
    text = row.get("text")
    try:
        fields = json.loads(text) if isinstance(text, str) else text
    except ValueError as problem:
        raise BadRow("bad_json", f"text is not valid JSON: {problem}") from problem
    if not isinstance(fields, dict):
        raise BadRow(
            "bad_json",
            f"text holds {type(fields).__name__}, not an object with question, chosen and rejected",
        )
    return UncheckedPair(
        _images(row), fields.get("question"), fields.get("chosen"), fields.get("rejected")
    )


def _ranking(row: Record) -> UncheckedPair:
    """VLFeedback: several rated answers. The best and the worst by mean rating make the pair; a tie
    gives none.
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
    return UncheckedPair(_images(row), row.get("prompt"), best[1], worst[1])


def _completions(row: Record) -> list[dict[str, Any]]:
    completions = row.get("completions")
    if isinstance(
        completions, dict
    ):  # how `datasets` gives a sequence of structs: one list for each field
        return [
            dict(zip(completions, values, strict=True))
            for values in zip(*completions.values(), strict=True)
        ]
    if not isinstance(completions, list) or not all(isinstance(one, dict) for one in completions):
        raise BadRow(
            "unknown_message",
            f"completions holds {type(completions).__name__}, not a list of answers",
        )
    return completions


def _mean_rating(annotations: Any) -> float | None:
    """The mean over all aspects; None if one is N/A or there are none."""
    ratings: list[float] = []
    for aspect in (annotations or {}).values():
        rating: Any = aspect.get("Rating") if isinstance(aspect, dict) else aspect
        try:
            ratings.append(float(rating))
        except (TypeError, ValueError):
            return None
    return sum(ratings) / len(ratings) if ratings else None


def _sharegpt(row: Record) -> UncheckedPair:
    """LLaMA-Factory's ranking: the conversation so far, and the next turn twice."""
    turns = (
        row.get("conversations") if row.get("conversations") is not None else row.get("messages")
    )
    return UncheckedPair(
        _images(row), turns, row.get("chosen"), row.get("rejected"), row.get("system")
    )


def _alpaca(row: Record) -> UncheckedPair:
    """LLaMA-Factory's alpaca ranking: an instruction and its input."""
    question = "\n".join(text for text in (row.get("instruction"), row.get("input")) if text)
    return UncheckedPair(
        _images(row), question, row.get("chosen"), row.get("rejected"), row.get("system")
    )


def _swift(row: Record) -> UncheckedPair:
    """ms-swift: a conversation that ends with the chosen answer, and the rejected one, or its whole
    conversation.
    """
    turns = list(row.get("messages") or [])
    if not turns:
        raise BadRow("empty_prompt", "messages is empty")
    if row.get("rejected_images") not in (None, [], row.get("images")):
        raise BadRow("other_images_for_rejected", "chosen and rejected are about different images")
    if row.get("rejected_messages"):
        return UncheckedPair(_images(row), None, turns, list(row["rejected_messages"]))
    return UncheckedPair(_images(row), turns[:-1], turns[-1], row.get("rejected_response"))


def _llava_outputs(row: Record) -> UncheckedPair:
    """LLaVA-RLHF: a conversation, two outputs, and which of them (1 or 2) people preferred."""
    outputs = (row.get("output_1"), row.get("output_2"))
    preferred = row.get("preference")
    if preferred not in (1, 2):
        raise BadRow("tied_ranking", f"preference is {preferred!r}, not 1 or 2")
    return UncheckedPair(
        _images(row), row.get("conversations"), outputs[preferred - 1], outputs[2 - preferred]
    )


def _llava_twice(row: Record) -> UncheckedPair:
    """POVID: the whole conversation twice, with the chosen and with the rejected answer."""
    return UncheckedPair(
        _images(row), None, row.get("conversations"), row.get("rejected_conversations")
    )


# (name, columns that must be there, columns that must not, unchecked_pair)
_FORMATS: tuple[tuple[str, tuple[str, ...], Callable[[Record], UncheckedPair]], ...] = (
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
            f"{where}: column {videos[0]} holds videos; vlmdpo trains on images: sample frames "
            "to images first"
        )
    image_columns = tuple(column for column in IMAGE_COLUMNS if column in found)[:1]
    for name, needed, unchecked_pair in _FORMATS:
        if all(column in found for column in needed) and not (
            name == "RLHF-V" and not _holds_json(record.get("text"))
        ):
            return Schema(name, tuple(dict.fromkeys([*image_columns, *needed])), unchecked_pair)
    raise DataError(
        f"{where}: no known preference format in columns {', '.join(found) or '(none)'}; "
        "say which is which, as in --map image=photo,question=ask,chosen=good,rejected=bad"
    )


def _holds_json(text: Any) -> bool:
    return isinstance(text, dict) or (isinstance(text, str) and text.lstrip().startswith("{"))


def mapped(
    mapping: Mapping[str, str], columns: Iterable[str], record: Record, where: str
) -> Schema:
    """The schema given by `--map`: {target: column}, with dots reaching into structs and lists.

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
    image_column = names["images"] if "images" in mapping or "images" in found else names["image"]
    used = (image_column, names["question"], names["chosen"], names["rejected"])
    return Schema("mapped", tuple(dict.fromkeys(used)), functools.partial(_mapped, used))


def _mapped(columns: tuple[str, ...], row: Record) -> UncheckedPair:
    return UncheckedPair(*(_value_at(row, column) for column in columns))


def _value_at(row: Any, path: str) -> Any:
    """The value at a dotted path such as "answers.0.text"; None if there is none."""
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
