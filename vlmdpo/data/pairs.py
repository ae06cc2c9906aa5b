"""One preference pair, and what makes a row a usable one. Knows nothing of files, columns or
models.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmdpo.data.images import BadImage, read

PLACEHOLDER = "<image>"  # how LLaVA, LLaMA-Factory and ms-swift mark a picture's place in a text
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
    """Why a row cannot be used: `reason` is the counted name, the text says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Draft:
    """What a schema found in a source row, unchecked: image cells, prompt turns, both answers."""

    images: Any
    prompt: Any  # a text, or messages
    chosen: Any  # a text, a message, or messages that may begin with the prompt
    rejected: Any
    system: str | None = None


@dataclass(frozen=True)
class PreferencePair:
    """One checked pair: encoded pictures in the order they are shown, the prompt's messages, one
    answer message each.
    """

    images: tuple[bytes, ...]
    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    notes: tuple[str, ...] = field(default=())

    def keys(self) -> tuple[str, str, tuple[str, ...]]:
        """(key of the row, key of its copy with the answers swapped, key of each picture), 16 hex
        digits each.

        A row without pictures counts its prompt as one, so that a split never has the same prompt
        on both sides.
        """
        pictures = tuple(hashlib.sha256(image).hexdigest()[:16] for image in self.images)
        asked = repr([(message["role"], text_of(message)) for message in self.prompt])
        first, second = text_of(self.chosen), text_of(self.rejected)
        return (
            _key(pictures, asked, first, second),
            _key(pictures, asked, second, first),
            pictures or (_key(asked),),
        )


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of one row: its prompt with its pictures, both answers, and how many of the prompt's
    are the pictures'.
    """

    prompt: int
    chosen: int
    rejected: int
    images: int

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two sequences that stock TRL would make of it."""
        return self.prompt + max(self.chosen, self.rejected)


def _key(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def text_of(message: Message) -> str:
    """A message as one text, its pictures as placeholders."""
    return "\n".join(
        PLACEHOLDER if part["type"] == "image" else str(part["text"]) for part in message["content"]
    )


def message(role: str, text: str, pictures: int = 0) -> Message:
    """A message of one text, behind the places of so many pictures."""
    places = [{"type": "image", "text": None} for _ in range(pictures)]
    return {"role": role, "content": [*places, {"type": "text", "text": text}]}


def check(draft: Draft, root: Path) -> PreferencePair:
    """The pair in a draft, its pictures read from below `root`. Raises BadRow with the reason it
    cannot be used.
    """
    prompt = _messages(draft.prompt, "user", "prompt")
    if draft.system and draft.system.strip():
        prompt = [message("system", draft.system.strip()), *prompt]
    chosen, rejected = (
        _messages(draft.chosen, "assistant", "chosen"),
        _messages(draft.rejected, "assistant", "rejected"),
    )
    if not prompt or len(chosen) > 1 or len(rejected) > 1:
        prompt, chosen, rejected = _common_prompt(prompt, chosen, rejected)
    _answerable(prompt)
    better, worse = _answer(chosen, "chosen"), _answer(rejected, "rejected")
    if text_of(better) == text_of(worse):
        raise BadRow("identical_answers", f"chosen and rejected are both {text_of(better)[:60]!r}")
    cells = _cells(draft.images)
    prompt = _placed(prompt, len(cells))
    try:
        images = tuple(read(cell, root) for cell in cells)
    except BadImage as problem:
        raise BadRow(problem.reason, str(problem)) from problem
    return PreferencePair(images, tuple(prompt), better, worse, () if images else ("no_image",))


def _messages(value: Any, role: str, where: str) -> list[Message]:
    """Messages out of a text, one message or a list of them, in any spelling of roles and contents
    that is known.
    """
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
        said = turn.get("role") or turn.get("from")
        if said not in _ROLES:
            raise BadRow(
                "unknown_role", f"{where} has a turn of {said!r}; known: {', '.join(_ROLES)}"
            )
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        found.append({"role": _ROLES[said], "content": _parts(content, where)})
    return found


def _parts(content: Any, where: str) -> list[Part]:
    """A content as parts: {"type": "text", "text"} and {"type": "image", "text": None}."""
    if content is None:
        return []
    if isinstance(content, str):
        if _VIDEO_PLACEHOLDER in content:
            raise BadRow("video", f"{where} shows a video; only pictures are trained on")
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
            f"{where} has a content of {type(content).__name__}, not text or parts",
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
                f"{where} has a part of type {kind!r}; only text and pictures are trained on",
            )
    return found


def _common_prompt(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The prompt of answers that repeat it (TRL's implicit prompt): what both have in common."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == min(len(chosen), len(rejected)) and shared:
        shared -= (
            1  # the same to the end: the answers are identical, and the check for that names it
        )
    said = chosen[:shared]
    if prompt and said and said[-len(prompt) :] != prompt:
        raise BadRow("two_prompts", "the answers repeat another prompt than the row's own")
    return said or prompt, chosen[shared:], rejected[shared:]


def _answerable(prompt: list[Message]) -> None:
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
    """The one assistant message of an answer."""
    if len(turns) > 1 or (turns and turns[0]["role"] != "assistant"):
        raise BadRow(
            "answer_not_one_turn",
            f"{where} is {' + '.join(turn['role'] for turn in turns)}, not one assistant turn",
        )
    parts = turns[0]["content"] if turns else []
    if any(part["type"] == "image" for part in parts):
        raise BadRow(
            "placeholder_miscount", f"{where} holds {PLACEHOLDER}, and answers show no picture"
        )
    if not parts:
        raise BadRow(f"empty_{where}", f"{where} is empty")
    return message("assistant", "\n".join(str(part["text"]) for part in parts))


def _cells(images: Any) -> list[Any]:
    """Image cells as a list: nothing, one cell or several."""
    if images is None or (
        isinstance(images, dict) and images.get("bytes") is None and images.get("path") is None
    ):
        return []
    if isinstance(images, (list, tuple)):
        return [cell for one in images for cell in (_cells(one) or ([one] if one is None else []))]
    return [images]


def _placed(prompt: list[Message], pictures: int) -> list[Message]:
    """The prompt with a place for every picture: where the texts say so, else all before the first
    question.
    """
    places = sum(part["type"] == "image" for turn in prompt for part in turn["content"])
    if places == pictures:
        return prompt
    if places:
        raise BadRow(
            "placeholder_miscount",
            f"{places} image placeholders in the prompt, {pictures} pictures in the row",
        )
    first = next(number for number, turn in enumerate(prompt) if turn["role"] == "user")
    front = message("user", "", pictures)["content"][:-1]
    return [
        {**turn, "content": [*front, *turn["content"]]} if number == first else turn
        for number, turn in enumerate(prompt)
    ]
