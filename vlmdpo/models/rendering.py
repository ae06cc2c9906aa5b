"""Conversation → text, for everything that trains on or asks a model. Nothing else renders.

How a model's chat template wants its messages is found out by rendering a conversation whose parts
can be recognized (see `template_probe`), once for each processor. A prompt is always the template's
generation prompt, in training as in asking, and an answer is its text and the end of a turn.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from vlmdpo import ui
from vlmdpo.data.pairs import question_message
from vlmdpo.data.reasons import BadRow
from vlmdpo.errors import ModelError
from vlmdpo.models.chat_template import (
    Message,
    PromptSettings,
    Rendering,
    apply_template,
    text_message,
)
from vlmdpo.models.families import reserved_tokens
from vlmdpo.models.protocols import Processor
from vlmdpo.models.template_probe import probe

RENDERING = "rendering.json"  # beside saved weights: how they were trained
_ATTRIBUTE = "_vlmdpo_rendering"


class CannotRender(BadRow, ValueError):
    """Why a conversation cannot be rendered."""


def set_rendering(processor: Processor, settings: PromptSettings, model: str = "") -> Rendering:
    """Probe the processor's chat template, and keep what was found on it.

    Args:
        model: its name, for messages.

    Raises ModelError where the template cannot render a question about an image, ConfigError where
    it cannot take the settings.
    """
    found = probe(processor, settings, model or type(processor).__name__)
    setattr(processor, _ATTRIBUTE, found)
    return found


def rendering_of(processor: Processor) -> Rendering:
    """What was found for a processor; found now if it was not, or for another template."""
    found: Rendering | None = getattr(processor, _ATTRIBUTE, None)
    if found is None:
        return set_rendering(processor, PromptSettings())
    if found.shipped != processor.chat_template:
        return set_rendering(processor, found.settings)
    return found


def render_prompt(processor: Processor, messages: Sequence[Message]) -> str:
    """A conversation that ends with the user's turn, up to where the answer begins.

    Raises CannotRender.
    """
    rendering = rendering_of(processor)
    has_system = any(message["role"] == "system" for message in messages)
    if rendering.settings.system is not None and not has_system:
        messages = [text_message("system", rendering.settings.system), *messages]
    for kind in _kinds(messages):
        if kind in rendering.refuses:
            reason = f"the chat template takes no {kind}: {rendering.refuses[kind]}"
            raise CannotRender("chat_template_refuses", reason)
    try:
        text = apply_template(processor, rendering, messages, add_generation_prompt=True)
    except TemplateError as problem:  # a template's raise_exception
        raise CannotRender("chat_template_refuses", " ".join(str(problem).split())) from problem
    images = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    places = text.count(rendering.image_place) if rendering.image_place else 0
    if rendering.image_place and places != images * rendering.places_per_image:
        raise CannotRender(
            "placeholder_miscount",
            f"the rendered prompt has {places} of {images * rendering.places_per_image} image "
            f"placeholders ({rendering.image_place})",
        )
    return rendering.bos + text + rendering.prompt_end


def _kinds(messages: Sequence[Message]) -> list[str]:
    """What a conversation has besides one question about an image, as `Rendering.refuses` says."""
    roles = [message["role"] for message in messages]
    has_image = any(part["type"] == "image" for turn in messages for part in turn["content"])
    found = {
        "questions without an image": not has_image,
        "earlier turns": roles.count("user") > 1,
        "system messages": "system" in roles,
    }
    return [kind for kind, holds in found.items() if holds]


def render_question(processor: Processor, question: str, images: int = 1) -> str:
    """One user turn of images and a question, up to the answer.

    `<image>` in the question is an image's place, as in the rows that `prepare` reads. Raises
    BadRow.
    """
    turn = question_message(question, images)
    texts = [str(part["text"]) for part in turn["content"] if part["type"] == "text"]
    for token in reserved_tokens(processor):
        if any(token in text for text in texts):
            raise CannotRender(
                "placeholder_miscount",
                f"the question holds {token!r}, which the model reads as an image",
            )
    return render_prompt(processor, [turn])


def render_answer(processor: Processor, text: str) -> str:
    """An answer as it follows a rendered prompt, its end included."""
    rendering = rendering_of(processor)
    own = text.strip() if rendering.strips_answers else text
    return rendering.answer_start + own + rendering.answer_end


def stop_token_ids(model: Any, processor: Processor) -> list[int]:
    """The tokens at which an answer ends: those of the model's settings, and the template's."""
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, (list, tuple)) else [configured]
    ends = [*ends, rendering_of(processor).end_token_id]
    found = list(dict.fromkeys(int(end) for end in ends if end is not None))
    return found or [int(processor.tokenizer.eos_token_id)]


def announce(processor: Processor) -> None:
    """Print what a user should know about how prompts are rendered; once in a process."""
    rendering = rendering_of(processor)
    _announce(rendering.notes, rendering.warnings)


@functools.cache
def _announce(notes: tuple[str, ...], warnings: tuple[str, ...]) -> None:
    for note in notes:
        ui.say(note)
    for warning in warnings:
        ui.warn(warning)


def save_settings(processor: Processor, folder: Path) -> None:
    """Write how prompts were rendered beside saved weights, so that they are asked the same way."""
    settings = asdict(rendering_of(processor).settings)
    del settings["close_thinking"]  # a property of the call
    (folder / RENDERING).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_settings(folder: Path) -> PromptSettings | None:
    """What `save_settings` wrote; None for a folder without it. Raises ModelError."""
    path = folder / RENDERING
    if not path.is_file():
        return None
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        settings = PromptSettings(**read)
        if settings.date is not None:
            datetime.date.fromisoformat(settings.date)
        dict(settings.template_kwargs)
    except (OSError, ValueError, TypeError) as problem:
        raise ModelError(f"'{path}' is damaged: {problem}; train again, or remove it") from problem
    return settings
