"""One preference pair, and the checks that make a row usable.

This module knows nothing about files, columns or models.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmdpo.data.images import BadImage, read

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

Part = dict[str, str | None]
Message = dict[str, Any]  # {"role", "content": [Part, ...]}


class BadRow(Exception):
    """Why a row cannot be used: `reason` is the name it is counted by, the text says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class UncheckedPair:
    """What a schema found in a source row: image cells, prompt turns, both answers."""

    images: Any
    prompt: Any  # a text, or messages
    chosen: Any  # a text, a message, or messages that may begin with the prompt
    rejected: Any
    system: str | None = None


@dataclass(frozen=True)
class PreferencePair:
    """One checked pair: encoded images in order, the prompt's messages, one message per answer."""

    images: tuple[bytes, ...]
    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    notes: tuple[str, ...] = field(default=())

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


def check_text(text: Any, where: str) -> str:
    """The text of a cell, which tokenizers must be able to encode. Raises BadRow."""
    if not isinstance(text, str):
        raise BadRow("not_a_text", f"{where} is of type {type(text).__name__}, not a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        half = f"U+{ord(text[problem.start]):04X}"
        raise BadRow(
            "lone_surrogate", f"{where} holds {half}, half of a character written as two"
        ) from problem
    return text


def question_message(text: Any, images: int = 1) -> Message:
    """The user's turn that asks `text` about this many images, whose places `<image>` may mark.

    Raises BadRow.
    """
    turns = _messages(check_text(text, "the question"), "user", "the question")
    _check_prompt(turns)
    [turn] = _with_image_places(turns, images)
    return turn


def check(unchecked: UncheckedPair, root: Path) -> PreferencePair:
    """The checked pair, with its images read from below `root`. Raises BadRow."""
    prompt = _messages(unchecked.prompt, "user", "prompt")
    if unchecked.system and unchecked.system.strip():
        prompt = [message("system", unchecked.system.strip()), *prompt]
    chosen, rejected = (
        _messages(unchecked.chosen, "assistant", "chosen"),
        _messages(unchecked.rejected, "assistant", "rejected"),
    )
    if not prompt or len(chosen) > 1 or len(rejected) > 1:
        prompt, chosen, rejected = _common_prompt(prompt, chosen, rejected)
    _check_prompt(prompt)
    chosen_answer, rejected_answer = _answer(chosen, "chosen"), _answer(rejected, "rejected")
    text = text_of(chosen_answer)
    if text == text_of(rejected_answer):
        raise BadRow("identical_answers", f"chosen and rejected are both {text[:60]!r}")
    cells = _image_cells(unchecked.images)
    prompt = _with_image_places(prompt, len(cells))
    try:
        images = tuple(read(cell, root) for cell in cells)
    except BadImage as problem:
        raise BadRow(problem.reason, str(problem)) from problem
    notes = () if images else ("no_image",)
    return PreferencePair(images, tuple(prompt), chosen_answer, rejected_answer, notes)


def _messages(value: Any, role: str, where: str) -> list[Message]:
    """Messages from a text, one message or a list, in any known spelling of roles and contents."""
    if value is None:
        return []
    if isinstance(value, str):
        return [{"role": role, "content": _parts(value, where)}] if value.strip() else []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(turn, dict) for turn in value):
        raise BadRow(
            "unknown_message", f"{where} holds {type(value).__name__}, not a text or messages"
        )
    found = []
    for turn in value:
        role_name = turn.get("role") or turn.get("from")
        if role_name not in _ROLES:
            raise BadRow(
                "unknown_role", f"{where} has a turn of {role_name!r}; known: {', '.join(_ROLES)}"
            )
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        found.append({"role": _ROLES[role_name], "content": _parts(content, where)})
    return found


def _parts(content: Any, where: str) -> list[Part]:
    """Content as parts: {"type": "text", "text"} and {"type": "image", "text": None}."""
    if content is None:
        return []
    if isinstance(content, str):
        if _VIDEO_PLACEHOLDER in content:
            raise BadRow("video", f"{where} has a video; only images are supported")
        pieces: list[Part] = []
        for number, text in enumerate(content.split(PLACEHOLDER)):
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
    found: list[Part] = []
    for part in content:
        kind = part.get("type")
        if kind == "text":
            found += _parts(part.get("text") or "", where)
        elif kind in ("image", "image_url"):
            found.append({"type": "image", "text": None})
        else:
            reason = "video" if kind in ("video", "video_url") else "unknown_message"
            raise BadRow(
                reason,
                f"{where} has a part of type {kind!r}; only text and images are supported",
            )
    return found


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


def _answer(turns: list[Message], where: str) -> Message:
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
    if not parts:
        raise BadRow(f"empty_{where}", f"{where} is empty")
    return message("assistant", "\n".join(str(part["text"]) for part in parts))


def _image_cells(images: Any) -> list[Any]:
    """Image cells as a list."""
    if images is None or (
        isinstance(images, dict) and images.get("bytes") is None and images.get("path") is None
    ):
        return []
    if isinstance(images, (list, tuple)):
        return [
            cell for one in images for cell in (_image_cells(one) or ([one] if one is None else []))
        ]
    return [images]


def _with_image_places(prompt: list[Message], images: int) -> list[Message]:
    """The prompt with a place for every image: as its texts say, else before the first question."""
    places = sum(part["type"] == "image" for turn in prompt for part in turn["content"])
    if places == images:
        return prompt
    if places:
        raise BadRow(
            "placeholder_miscount",
            f"{places} image placeholders in the prompt, {images} images in the row",
        )
    first = next(number for number, turn in enumerate(prompt) if turn["role"] == "user")
    front = message("user", "", images)["content"][:-1]
    return [
        {**turn, "content": [*front, *turn["content"]]} if number == first else turn
        for number, turn in enumerate(prompt)
    ]
