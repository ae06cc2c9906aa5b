"""A chat template: where it comes from, what it reads, a date that stands still, and what it makes
of messages.

`template_probe` finds out how a model's template wants its messages, and `rendering` is for all
that renders.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta

from vlmdpo.errors import ModelError
from vlmdpo.models.families import fallback_chat_template
from vlmdpo.models.protocols import Processor

# Variables by which published templates switch reasoning on and off.
THINKING_SWITCHES = ("enable_thinking", "thinking")
_THINKING_TAG = re.compile(r"<(/?)(think|thinking|thought|reasoning)>")
# What transformers adds to Jinja's language for `return_assistant_tokens_mask`.
_GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
# What transformers and the conversation itself supply.
_SUPPLIED = {
    *("messages", "tools", "documents", "add_generation_prompt", "raise_exception"),
    *("strftime_now", "dict", "namespace", "bos_token", "eos_token", "pad_token", "unk_token"),
}
Message = Mapping[str, Any]  # {"role", "content": [{"type", "text"}, ...]}
_DATE_CODES = ("-d", "-m", "e", *"aAbBcdHIjmMpSUwWxXyYZ", "%")


@dataclass(frozen=True)
class PromptSettings:
    """What a user or a run decides about prompts.

    Attributes:
        system: the system message of conversations that have none of their own.
        template_kwargs: variables of the chat template.
        date: the date that templates see, as 2026-11-27; None for today.
        close_thinking: end reasoning that a prompt would leave open, even where `template_kwargs`
            asks for it.
    """

    system: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    close_thinking: bool = False


@dataclass(frozen=True)
class Rendering:
    """How one model's conversations are rendered.

    Attributes:
        settings: what it was probed with.
        shipped: the processor's chat template when it was probed, to notice another.
        template: the template in effect, with its date fixed.
        variables: what the template is given by name.
        plain_roles: the roles whose content is one text instead of a list of parts.
        refuses: kinds of conversations that do not come out whole, each with the reason.
        image_place: what stands for an image in a text.
        places_per_image: how often `image_place` is rendered for each image.
        bos: what the tokenizer puts before a text and the template does not.
        prompt_end: what closes reasoning that the generation prompt leaves open.
        answer_start: white space between the generation prompt and an answer.
        answer_end: the template's end of a turn, with an end token.
        strips_answers: whether the template strips white space around answers.
        end_token_id: the token that ends an answer.
        sentinel: a rendered conversation: processors that render it alike render all alike.
        undated_sentinel: the same, without the date.
        notes: what a user should know, as messages.
        warnings: the same, where something may be wrong.
    """

    settings: PromptSettings
    shipped: Any
    template: str
    variables: Mapping[str, Any]
    plain_roles: frozenset[str] = frozenset()
    refuses: Mapping[str, str] = field(default_factory=dict)
    image_place: str = ""
    places_per_image: int = 0
    bos: str = ""
    prompt_end: str = ""
    answer_start: str = ""
    answer_end: str = ""
    strips_answers: bool = False
    end_token_id: int | None = None
    sentinel: str = ""
    undated_sentinel: str = ""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def add_missing_template(processor: Any) -> None:
    """Give a processor without a chat template its tokenizer's, or else its family's."""
    if processor.chat_template is None:
        processor.chat_template = getattr(processor.tokenizer, "chat_template", None)
    if processor.chat_template is None:
        processor.chat_template = fallback_chat_template(processor)


def template_text(processor: Processor, model: str) -> str:
    """The chat template in effect.

    Raises ModelError where there is none, or several and none of them is the default.
    """
    template: Any = processor.chat_template
    if isinstance(template, Mapping):
        if "default" not in template:
            raise ModelError(
                f"--model: '{model}' ships the chat templates {', '.join(template)}, none of which "
                'is named "default"'
            )
        template = template["default"]
    if not template:
        raise ModelError(
            f"--model: '{model}' ships no chat template, which DPO data needs; use an "
            "instruction-tuned version"
        )
    return str(template)


def variables(template: str) -> set[str]:
    """The variables that a template reads besides what transformers supplies.

    Raises jinja2.TemplateError for a template that is not valid Jinja.
    """
    environment = jinja2.Environment(extensions=[jinja2.ext.loopcontrols], autoescape=True)
    parsed = environment.parse(_GENERATION_TAG.sub("", template))
    return jinja2.meta.find_undeclared_variables(parsed) - _SUPPLIED


def is_dated(template: str) -> bool:
    """Whether a template writes today's date into prompts."""
    return "strftime_now" in template


def with_frozen_date(template: str, date: datetime.date | None) -> str:
    """The template with its date fixed; None leaves the format in place of the date.

    Otherwise tomorrow's prompts would not be those whose log-probs were computed today.
    transformers passes no functions to a template, so the date is written as a macro, which hides
    the function of the same name.
    """
    if not is_dated(template):
        return template
    values = (
        [] if date is None else [[f"%{code}", date.strftime(f"%{code}")] for code in _DATE_CODES]
    )
    macro = (
        "{%- macro strftime_now(format) -%}{%- set date = namespace(text=format) -%}"
        f"{{%- for code, value in {values!r} -%}}"
        "{%- set date.text = date.text | replace(code, value) -%}{%- endfor -%}"
        "{{- date.text -}}{%- endmacro -%}"
    )
    return macro + template


def open_thinking_tag(prompt: str) -> str | None:
    """The name of the tag that a prompt opens for reasoning and leaves open; else None."""
    tags = _THINKING_TAG.findall(prompt)
    return str(tags[-1][1]) if tags and not tags[-1][0] else None


def text_message(role: str, text: str, images: int = 0) -> Message:
    """A message of one text, after the places of this many images."""
    places = [{"type": "image"} for _ in range(images)]
    return {"role": role, "content": [*places, {"type": "text", "text": text}]}


def apply_template(
    processor: Processor,
    rendering: Rendering,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The template's own rendering of messages made of parts. Raises what the template raises."""
    return processor.apply_chat_template(
        [_as_wanted(rendering, message) for message in messages],
        chat_template=rendering.template,
        add_generation_prompt=add_generation_prompt,
        **rendering.variables,
    )


def _as_wanted(rendering: Rendering, message: Message) -> dict[str, Any]:
    """A message with its content as the template takes it for this role."""
    if message["role"] not in rendering.plain_roles:
        # Without the keys that are None: templates ask whether a part has a text, not which.
        parts = [
            {key: value for key, value in part.items() if value is not None}
            for part in message["content"]
        ]
        return {"role": message["role"], "content": parts}
    texts = [
        rendering.image_place if part["type"] == "image" else str(part["text"])
        for part in message["content"]
    ]
    return {"role": message["role"], "content": "\n".join(texts)}
