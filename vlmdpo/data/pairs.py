"""One preference pair, and the checks that make a row usable.

This module knows nothing about files, columns or models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.data.image_cells import image_cells, read
from vlmdpo.data.reasons import BadRow, missing, shown
from vlmdpo.data.templates import without_end_tokens, without_template

# How files of text are read: bytes that are not UTF-8 become lone surrogates (PEP 383).
_ESCAPED_BYTES = {chr(code) for code in range(0xDC80, 0xDD00)}
SIDES = ("chosen", "rejected")
PLACEHOLDER = "<image>"  # marks the place of an image in texts of LLaVA, LLaMA-Factory, ms-swift
_VIDEO_PLACEHOLDER = "<video>"
_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "llava": "assistant",
    "system": "system",
}

# {"type": "text" or "image", "text"}; while a row is checked, "cell" is an image's own.
Part = dict[str, Any]
_IMAGE_KEYS = ("image", "image_url", "path", "url", "bytes")  # of a part that holds its image
Message = dict[str, Any]  # {"role", "content": [Part, ...]}


@dataclass(frozen=True)
class UncheckedPair:
    """What a schema found in a source row: image cells, prompt turns, both answers."""

    images: Any
    prompt: Any  # a text, or messages
    chosen: Any  # a text, a message, or messages that may begin with the prompt
    rejected: Any
    system: Any = None
    voted_at: Any = None  # when a person chose, in rows of `vlmdpo compare`


@dataclass(frozen=True)
class PreferencePair:
    """One checked pair: encoded images in order, the prompt's messages, one message per answer."""

    images: tuple[bytes, ...]
    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    notes: tuple[str, ...] = field(default=())
    voted_at: str | None = None

    def keys(self) -> tuple[str, str, tuple[str, ...]]:
        """(key of the row, key of the row with swapped answers, key of each image), in 16 hex
        digits.

        A row without images has the key of its prompt in their place, so that no prompt is in both
        splits.
        """
        image_keys = tuple(hashlib.sha256(image).hexdigest()[:16] for image in self.images)
        prompt = repr([(message["role"], text_of(message)) for message in self.prompt])
        first, second = text_of(self.chosen), text_of(self.rejected)
        return (
            _key(image_keys, prompt, first, second),
            _key(image_keys, prompt, second, first),
            image_keys or (_key(prompt),),
        )


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of one row: the prompt with its images, both answers, and the images alone."""

    prompt: int
    chosen: int
    rejected: int
    images: int

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two sequences that stock TRL makes of a row."""
        return self.prompt + max(self.chosen, self.rejected)


def _key(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def text_of(message: Message) -> str:
    """A message as one text, with placeholders for images."""
    return "\n".join(
        PLACEHOLDER if part["type"] == "image" else str(part["text"]) for part in message["content"]
    )


def message(role: str, text: str, images: int = 0) -> Message:
    """A message of one text, after the places of this many images."""
    places = [{"type": "image", "text": None} for _ in range(images)]
    return {"role": role, "content": [*places, {"type": "text", "text": text}]}


def question_message(text: Any, images: int = 1) -> Message:
    """The user's turn that asks `text` about this many images, whose places `<image>` may mark.

    Raises BadRow.
    """
    if not isinstance(text, str):
        raise BadRow("unknown_message", f"the question is {type(text).__name__}, not a text")
    turn: Message = {"role": "user", "content": _parts(text, "the question")}
    _check_prompt([turn])
    [turn], _ = _with_image_places([turn], [None] * images)
    return turn


def check(unchecked: UncheckedPair, root: Path, allowed: Sequence[Path] = ()) -> PreferencePair:
    """The checked pair, with its images read from below `root` or a folder of `allowed`.

    Raises BadRow.
    """
    notes: list[str] = []
    prompt = _messages(unchecked.prompt, "user", "prompt", notes)
    system = _system(unchecked.system)
    prompt = [message("system", system), *prompt] if system else prompt
    chosen, rejected = (
        _messages(answer, "assistant", where, notes)
        for answer, where in ((unchecked.chosen, "chosen"), (unchecked.rejected, "rejected"))
    )
    if not prompt or len(chosen) > 1 or len(rejected) > 1:
        prompt, chosen, rejected = _common_prompt(prompt, chosen, rejected)
    _check_prompt(prompt)
    chosen_answer = _answer(chosen, "chosen", notes)
    rejected_answer = _answer(rejected, "rejected", notes)
    text = text_of(chosen_answer)
    if text == text_of(rejected_answer):
        raise BadRow("identical_answers", f"chosen and rejected are both {shown(text)}")
    prompt, cells = _with_image_places(prompt, image_cells(unchecked.images))
    images = tuple(read(cell, root, allowed) for cell in cells)
    notes += [] if images else ["no_image"]
    voted_at = unchecked.voted_at if isinstance(unchecked.voted_at, str) else None
    return PreferencePair(
        images, tuple(prompt), chosen_answer, rejected_answer, tuple(dict.fromkeys(notes)), voted_at
    )


def _system(value: Any) -> str:
    """The text of a system column, "" for none."""
    if missing(value):
        return ""
    if not isinstance(value, str):
        raise BadRow("unknown_message", f"system holds {type(value).__name__}, not a text")
    return _usable(value.strip(), "system")


def _usable(text: str, where: str) -> str:
    """The same text. Raises BadRow where it holds what no tokenizer can read."""
    if "\x00" in text:
        raise BadRow("invalid_text", f"{where} holds the character NUL")
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        half = text[problem.start : problem.start + 1]
        what = "a byte that is not UTF-8" if half in _ESCAPED_BYTES else "half a character"
        raise BadRow("invalid_text", f"{where} holds {what}, {shown(half)}") from None
    return text


def _messages(value: Any, role: str, where: str, notes: list[str]) -> list[Message]:
    """Messages from a text, one message or a list, in any known spelling of roles and contents."""
    if missing(value):
        return []
    if isinstance(value, str):
        value = [{"role": role, "content": value}] if value.strip() else []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(turn, dict) for turn in value):
        raise BadRow(
            "unknown_message", f"{where} holds {type(value).__name__}, not a text or messages"
        )
    found = []
    for turn in value:
        name = turn.get("role") or turn.get("from")
        if not isinstance(name, str) or name not in _ROLES:
            raise BadRow(
                "unknown_role", f"{where} has a turn of {shown(name)}; known: {', '.join(_ROLES)}"
            )
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        if isinstance(content, str) and _ROLES[name] != "system":
            cleaned = without_template if _ROLES[name] == "user" else without_end_tokens
            content, noted = cleaned(_usable(content, where))
            notes += noted
        found.append({"role": _ROLES[name], "content": _parts(content, where)})
    return found


def _parts(content: Any, where: str) -> list[Part]:
    """Content as parts: {"type": "text", "text"} and {"type": "image", "text": None}, the latter
    with a "cell" where it holds its image itself.
    """
    if missing(content):
        return []
    if isinstance(content, str):
        if _VIDEO_PLACEHOLDER in content:
            raise BadRow("video", f"{where} has a video; only images are supported")
        pieces: list[Part] = []
        for number, text in enumerate(_usable(content, where).split(PLACEHOLDER)):
            pieces += [{"type": "image", "text": None}] if number else []
            pieces += [{"type": "text", "text": text.strip()}] if text.strip() else []
        return pieces
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, (list, tuple)) or not all(
        isinstance(part, dict) for part in content
    ):
        raise BadRow(
            "unknown_message",
            f"{where} has content of type {type(content).__name__}, not text or parts",
        )
    return [piece for part in content for piece in _pieces(part, where)]


def _pieces(part: Mapping[str, Any], where: str) -> list[Part]:
    """One part of a message as parts of ours: as of TRL, OpenAI, Azure and Qwen."""
    kind = part.get("type")
    if kind is None:  # Qwen's: {"image": ...} and {"text": ...}
        kind = next((name for name in ("image", "text", "video") if part.get(name)), None)
    if kind in ("text", "input_text", "output_text"):
        return _parts(part.get("text") or "", where)
    if kind in ("image", "image_url", "input_image"):
        cell = next((part[key] for key in _IMAGE_KEYS if not missing(part.get(key) or None)), None)
        place: Part = {"type": "image", "text": None}
        return [place if cell is None else {**place, "cell": cell}]
    raise BadRow(
        "video" if kind in ("video", "video_url") else "unknown_message",
        f"{where} has a part of type {shown(kind)}; only text and images are supported",
    )


def _common_prompt(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """(prompt, chosen, rejected) of answers that repeat the prompt: TRL's implicit prompts."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == min(len(chosen), len(rejected)) and shared:
        shared -= 1  # the answers are identical, which a later check reports
    repeated = chosen[:shared]
    if prompt and repeated and repeated[-len(prompt) :] != prompt:
        raise BadRow("two_prompts", "the answers repeat a prompt that is not the row's own")
    return repeated or prompt, chosen[shared:], rejected[shared:]


def _check_prompt(prompt: list[Message]) -> None:
    """Raise BadRow unless the prompt asks something and ends with the user's turn."""
    if not any(
        part["type"] == "text"
        for turn in prompt
        if turn["role"] == "user"
        for part in turn["content"]
    ):
        raise BadRow("empty_prompt", "the row asks nothing")
    if prompt[-1]["role"] != "user":
        raise BadRow(
            "prompt_without_question",
            f"the prompt ends with a turn of {prompt[-1]['role']}, not of the user",
        )


def _answer(turns: list[Message], where: str, notes: list[str]) -> Message:
    """The only assistant message of an answer. Raises BadRow."""
    if len(turns) > 1 or (turns and turns[0]["role"] != "assistant"):
        raise BadRow(
            "answer_not_one_turn",
            f"{where} is {' + '.join(turn['role'] for turn in turns)}, not one assistant turn",
        )
    parts = turns[0]["content"] if turns else []
    if any(part["type"] == "image" for part in parts):
        raise BadRow(
            "placeholder_miscount", f"{where} has {PLACEHOLDER}, and answers cannot have images"
        )
    text, noted = without_end_tokens("\n".join(part["text"] for part in parts))
    notes += noted
    if not text:
        raise BadRow(f"empty_{where}", f"{where} is empty")
    return message("assistant", text)


def _with_image_places(prompt: list[Message], cells: list[Any]) -> tuple[list[Message], list[Any]]:
    """The prompt with a place for every image, and the images' cells in that order.

    The places are those of the prompt's texts and parts, else before the first question. Parts may
    hold images of their own; the row's images fill the other places.
    """
    places = [part for turn in prompt for part in turn["content"] if part["type"] == "image"]
    own = [part.pop("cell", None) for part in places]
    if any(cell is not None for cell in own) and len(cells) == own.count(None):
        rest = iter(cells)
        cells = [next(rest) if cell is None else cell for cell in own]
    if len(places) == len(cells):
        return prompt, cells
    if places:
        raise BadRow(
            "placeholder_miscount",
            f"{ui.count(len(places), 'image placeholder')} in the prompt, "
            f"{ui.count(len(cells), 'image')} in the row",
        )
    first = next(number for number, turn in enumerate(prompt) if turn["role"] == "user")
    front = message("user", "", len(cells))["content"][:-1]
    with_places = [
        {**turn, "content": [*front, *turn["content"]]} if number == first else turn
        for number, turn in enumerate(prompt)
    ]
    return with_places, cells
