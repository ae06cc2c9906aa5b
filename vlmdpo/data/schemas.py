"""The formats of preference data: how each is recognized by its columns, and read.

A new format is one function and one line in `_FORMATS`. The first that recognizes a source is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmdpo.data.image_cells import image_cells, is_empty
from vlmdpo.data.json_rows import parse
from vlmdpo.data.pairs import UncheckedPair
from vlmdpo.data.reasons import SHOWN, BadRow, missing, shown
from vlmdpo.data.text_files import no_header_hint
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
    """The cell of the first image column that names an image in this row.

    An empty text is taken only where no column names one.
    """
    cells = [_image_cell(row, column) for column in IMAGE_COLUMNS]
    named = [cell for cell in cells if image_cells(cell)]
    return next((cell for cell in named if cell != ""), named[0] if named else None)


def _image_cell(row: Record, column: str) -> Any:
    """One image column, also where it was flattened to `image.bytes` and `image.path`."""
    value = row.get(column)
    if missing(value) and column not in row:
        return {part: row.get(f"{column}.{part}") for part in ("bytes", "path")}
    if isinstance(value, str) and value.startswith('["'):  # a CSV cell can hold a list only as JSON
        with contextlib.suppress(ValueError):  # a file name, then
            return parse(value)
    return value


def _pair(row: Record, prompt: Any, chosen: Any, rejected: Any) -> UncheckedPair:
    """A pair of what a format found, with the columns that all formats share.

    Raises BadRow for a row about a video.
    """
    video = next((column for column in _VIDEO_COLUMNS if _names_video(row.get(column))), None)
    if video:
        raise BadRow("video", f"column {video} names a video; only images are supported")
    return UncheckedPair(
        _images(row), prompt, chosen, rejected, row.get("system"), row.get("voted_at")
    )


def _names_video(cell: Any) -> bool:
    return bool(cell) and not is_empty(cell)


def _turns(row: Record, column: str) -> list[Any]:
    """A column of messages. Raises BadRow for anything but a list."""
    value = row.get(column)
    if missing(value):
        return []
    if not isinstance(value, (list, tuple)):
        raise BadRow("unknown_message", f"{column} holds {type(value).__name__}, not messages")
    return list(value)


def _question(row: Record) -> UncheckedPair:
    return _pair(row, row.get("question"), row.get("chosen"), row.get("rejected"))


def _prompt(row: Record) -> UncheckedPair:
    return _pair(row, row.get("prompt"), row.get("chosen"), row.get("rejected"))


def _rlhf_v(row: Record) -> UncheckedPair:
    text = row.get("text")
    try:
        fields = parse(text) if isinstance(text, str) else text
    except ValueError as problem:
        raise BadRow("bad_json", f"text is not valid JSON: {problem}") from problem
    if not isinstance(fields, dict):
        raise BadRow(
            "bad_json",
            f"text holds {type(fields).__name__}, not an object with question, chosen and rejected",
        )
    return _pair(row, fields.get("question"), fields.get("chosen"), fields.get("rejected"))


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
    return _pair(row, row.get("prompt"), best[1], worst[1])


def _completions(row: Record) -> list[dict[str, Any]]:
    completions = row.get("completions")
    if isinstance(completions, dict) and all(
        isinstance(values, (list, tuple)) for values in completions.values()
    ):  # how `datasets` gives a sequence of structs: one list for each field
        if len({len(values) for values in completions.values()}) > 1:
            raise BadRow("unknown_message", "completions has lists of unequal lengths")
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
    if missing(annotations):
        return None
    if not isinstance(annotations, dict):
        raise BadRow(
            "unknown_message", f"annotations holds {type(annotations).__name__}, not ratings"
        )
    ratings = [
        _number(aspect.get("Rating") if isinstance(aspect, dict) else aspect)
        for aspect in annotations.values()
    ]
    known = [rating for rating in ratings if rating is not None]
    return sum(known) / len(known) if known and len(known) == len(ratings) else None


def _number(cell: Any) -> float | None:
    """A number, also in a text; None for anything else."""
    if not isinstance(cell, (int, float, str)):
        return None
    try:
        number = float(cell)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _sharegpt(row: Record) -> UncheckedPair:
    """LLaMA-Factory's ranking: the conversation so far, and the next turn twice."""
    turns = (
        row.get("conversations") if row.get("conversations") is not None else row.get("messages")
    )
    return _pair(row, turns, row.get("chosen"), row.get("rejected"))


def _alpaca(row: Record) -> UncheckedPair:
    """LLaMA-Factory's alpaca ranking: an instruction and its input, behind earlier turns."""
    texts = [row.get(column) for column in ("instruction", "input")]
    if not all(missing(text) or isinstance(text, str) for text in texts):
        kinds = " and ".join(type(text).__name__ for text in texts)
        raise BadRow("unknown_message", f"instruction and input hold {kinds}, not texts")
    question = "\n".join(text for text in texts if not missing(text) and text)
    turns: list[dict[str, Any]] = []
    for turn in _turns(row, "history"):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise BadRow("unknown_message", "history holds a turn that is not [question, answer]")
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    prompt = [*turns, {"role": "user", "content": question}] if turns else question
    return _pair(row, prompt, row.get("chosen"), row.get("rejected"))


def _swift(row: Record) -> UncheckedPair:
    """ms-swift: a conversation that ends with the chosen answer, and the rejected one, or its whole
    conversation.
    """
    turns = _turns(row, "messages")
    if not turns:
        raise BadRow("empty_prompt", "messages is empty")
    if row.get("rejected_images") not in (None, [], row.get("images")):
        raise BadRow("other_images_for_rejected", "chosen and rejected are about different images")
    rejected = _turns(row, "rejected_messages")
    if rejected:
        return _pair(row, None, turns, rejected)
    return _pair(row, turns[:-1], turns[-1], row.get("rejected_response"))


def _llava_outputs(row: Record) -> UncheckedPair:
    """LLaVA-RLHF: a conversation, two outputs, and which of them (1 or 2) people preferred."""
    outputs = (row.get("output_1"), row.get("output_2"))
    preferred = _number(row.get("preference"))
    if preferred not in (1, 2):
        raise BadRow("tied_ranking", f"preference is {shown(row.get('preference'))}, not 1 or 2")
    best, worst = outputs if preferred == 1 else outputs[::-1]
    return _pair(row, row.get("conversations"), best, worst)


def _llava_twice(row: Record) -> UncheckedPair:
    """POVID: the whole conversation twice, with the chosen and with the rejected answer."""
    return _pair(row, None, row.get("conversations"), row.get("rejected_conversations"))


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
        DataError: no schema fits, the source is about videos, or its images are in a column of
            another name. Says which columns were found and how to map them.
    """
    found = list(dict.fromkeys([*columns, *record]))
    videos = [column for column in _VIDEO_COLUMNS if _names_video(record.get(column))]
    if videos:
        raise DataError(
            f"{where}: column {videos[0]} holds videos; vlmdpo trains on images: sample frames "
            "to images first"
        )
    image_columns = _image_columns(found)[:1]
    for name, needed, unchecked_pair in _FORMATS:
        if all(column in found for column in needed) and not (
            name == "RLHF-V" and not _holds_json(record.get("text"))
        ):
            _check_other_columns(record, {*image_columns, *needed}, image_columns, where)
            return Schema(name, tuple(dict.fromkeys([*image_columns, *needed])), unchecked_pair)
    raise DataError(
        f"{where}: no known preference format in columns {_listed(found)}; "
        "say which is which, as in --map image=photo,question=ask,chosen=good,rejected=bad"
        f"{no_header_hint(found)}"
    )


def _image_columns(found: Iterable[str]) -> tuple[str, ...]:
    """The image columns, also those flattened to `image.bytes`."""
    found = set(found)
    names = (
        one
        for column in IMAGE_COLUMNS
        for one in (column, f"{column}.bytes", f"{column}.path")
        if one in found
    )
    return tuple(names)


def _check_other_columns(
    record: Record, used: set[str], image_columns: tuple[str, ...], where: str
) -> None:
    """Raise DataError where no column has images by its name, but one by its content: its rows
    would lose them.
    """
    if image_columns:
        return
    for column, value in record.items():
        if column not in used and _looks_like_image(value):
            raise DataError(
                f"{where}: column {shown(column)} seems to hold images, which this format has not; "
                f"add --map image={column} and the other columns, or remove it"
            )


def _looks_like_image(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and _looks_like_image(value[0])
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes)
    return isinstance(value, bytes) and value.startswith((b"\xff\xd8\xff", b"\x89PNG", b"RIFF"))


def _listed(columns: Iterable[str]) -> str:
    """Names of columns for a message: the first twenty, each shortened."""
    names = [name if len(name) <= SHOWN else f"{name[:SHOWN]}…" for name in map(str, columns)]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (", ".join(names[:20]) + more) or "(none)"


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
        if wanted and column not in found and column.split(".")[0] not in found:
            raise DataError(
                f"{where}: --map wants column '{column}' as {target}; found {_listed(found)}"
                f"{no_header_hint(found)}"
            )
    image_column = names["images"] if "images" in mapping or "images" in found else names["image"]
    used = (image_column, names["question"], names["chosen"], names["rejected"])
    is_named = "image" in mapping or "images" in mapping
    read = functools.partial(_mapped, used[1:], image_column if is_named else None)
    return Schema("mapped", tuple(dict.fromkeys(used)), read)


def _mapped(texts: tuple[str, ...], image_column: str | None, row: Record) -> UncheckedPair:
    prompt, chosen, rejected = (_value_at(row, column) for column in texts)
    pair = _pair(row, prompt, chosen, rejected)
    if image_column is None:
        return pair
    return dataclasses.replace(pair, images=_value_at(row, image_column))


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
