"""How a chat template wants its messages, found out by rendering words that can be recognized.

Published templates differ in what they take (content as a list of parts or as one text), in what
they add (a system message, BOS, today's date, a block for reasoning) and in what they leave out (an
end token after an answer). A wrong guess is silent: the model then trains on the Python spelling of
a list, or never learns to stop.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from vlmdpo.errors import ConfigError, ModelError, nearest
from vlmdpo.models import chat_template
from vlmdpo.models.chat_template import (
    Message,
    PromptSettings,
    Rendering,
    apply_template,
    text_message,
)
from vlmdpo.models.protocols import Processor

_SYSTEM, _FIRST, _SECOND = "sentinelsystem", "sentinelfirst", "sentinelsecond"
_ANSWER, _LAST_ANSWER = "sentinelanswer", "sentinellast"
# A message or its parts, as Python or JSON spells them.
_SPELLED_PARTS = re.compile(r"""['"](type['"]\s*:\s*['"]text|content['"]\s*:)""")
# What a template's code raises where it was written for content of another kind.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)


class _Unfit(Exception):
    """Why a conversation did not come out as it should."""


def probe(processor: Processor, settings: PromptSettings, model: str) -> Rendering:
    """How this processor's conversations are rendered.

    Args:
        model: its name, for messages.

    Raises:
        ModelError: the template cannot render a question about an image and its answer.
        ConfigError: it cannot take the system message or a variable of `settings`.
    """
    template = chat_template.template_text(processor, model)
    rendering = Rendering(
        settings=_dated(settings, template),
        shipped=processor.chat_template,
        template=template,
        variables=_variables(template, settings, model),
    )
    rendering = _with_date(rendering, template)
    rendering = dataclasses.replace(rendering, image_place=_image_place(processor, rendering))
    rendering = _with_roles(processor, rendering, model)
    rendering = _with_places(processor, rendering, model)
    rendering = _with_rarer_kinds(processor, rendering)
    rendering = _with_answer(processor, rendering, model)
    rendering = dataclasses.replace(rendering, bos=_missing_bos(processor, rendering))
    undated = dataclasses.replace(
        rendering, template=chat_template.with_frozen_date(template, None)
    )
    return dataclasses.replace(
        rendering,
        sentinel=_sentinel(processor, rendering),
        undated_sentinel=_sentinel(processor, undated),
    )


def _dated(settings: PromptSettings, template: str) -> PromptSettings:
    if settings.date is not None or not chat_template.is_dated(template):
        return settings
    return dataclasses.replace(settings, date=_today().isoformat())


def _today() -> datetime.date:
    return datetime.date.today()


def _with_date(rendering: Rendering, template: str) -> Rendering:
    if rendering.settings.date is None:
        return rendering
    date = datetime.date.fromisoformat(rendering.settings.date)
    return dataclasses.replace(rendering, template=chat_template.with_frozen_date(template, date))


def _variables(template: str, settings: PromptSettings, model: str) -> dict[str, Any]:
    """What the template is given by name: reasoning is off unless it was asked for."""
    try:
        known = chat_template.variables(template)
    except TemplateError as problem:
        raise _refused(model, f"it is not valid Jinja: {problem}") from problem
    for name in settings.template_kwargs:
        if name not in known:
            reads = f"It reads {', '.join(sorted(known)) or 'none'}."
            raise ConfigError(
                f"--chat-template-kwargs: the chat template of '{model}' has no variable "
                f"'{name}'.{nearest(name, known)} {reads}"
            )
    off = {name: False for name in chat_template.THINKING_SWITCHES if name in known}
    return {**off, **settings.template_kwargs}


def _image_place(processor: Processor, rendering: Rendering) -> str:
    """What stands for an image in a rendered prompt, before the processor expands it.

    Some processors name the token that it is expanded to first (Llama 4), others a token that only
    surrounds images.
    """
    names = ("image_token", "fake_image_token", "boi_token")
    tokens = [str(token) for name in names if (token := getattr(processor, name, None))]
    try:
        question = [text_message("user", _FIRST, images=1)]
        text = apply_template(processor, rendering, question, add_generation_prompt=True)
    except _TEMPLATE_ERRORS:  # it wants a text, which needs the token in it
        text = ""
    return next((token for token in tokens if token in text), tokens[0] if tokens else "")


def _with_roles(processor: Processor, rendering: Rendering, model: str) -> Rendering:
    """Whether each role's content is a list of parts or one text.

    Raises ModelError where neither comes out, ConfigError where that is due to `--system`.
    """
    question = text_message("user", _FIRST, images=1)
    answer = text_message("assistant", _ANSWER)
    for role, conversation in (("user", [question]), ("assistant", [question, answer])):
        rendering = _fit_role(processor, rendering, role, conversation, model)
    return rendering


def _with_rarer_kinds(processor: Processor, rendering: Rendering) -> Rendering:
    """Which conversations come out besides one question about one image and its answer.

    Those that do not are left to the rows that have them.
    """
    question = text_message("user", _FIRST, images=1)
    answer = text_message("assistant", _ANSWER)
    second = text_message("user", _SECOND)
    own = _own_system(rendering)
    kinds: dict[str, tuple[Sequence[Message], set[str]]] = {
        "questions without an image": ([*own, second], set()),
        "earlier turns": ([*own, question, answer, second], set()),
        "system messages": ([text_message("system", _SYSTEM), question], {"system"}),
    }
    for kind, (conversation, roles) in kinds.items():
        fitted, problem = _first_that_fits(processor, rendering, conversation, roles)
        if fitted is None:
            refused = {**rendering.refuses, kind: problem}
            rendering = dataclasses.replace(rendering, refuses=refused)
        else:
            rendering = fitted
    return rendering


def _fit_role(
    processor: Processor,
    rendering: Rendering,
    role: str,
    conversation: Sequence[Message],
    model: str,
) -> Rendering:
    """The rendering with `role` as it must be for this conversation to come out."""
    system = _own_system(rendering)
    fitted, problem = _first_that_fits(
        processor, rendering, [*system, *conversation], {role}, {"system"} if system else set()
    )
    if fitted is not None:
        return fitted
    other = [] if system else [text_message("system", _SYSTEM)]
    fitted, _ = _first_that_fits(
        processor, rendering, [*other, *conversation], {role}, {"system"} if other else set()
    )
    if fitted is None:
        raise _refused(model, problem)
    if system:
        raise ConfigError(f"--system: the chat template of '{model}' takes none: {problem}")
    raise _refused(model, "it needs a system message; give one with --system TEXT")


def _first_that_fits(
    processor: Processor,
    rendering: Rendering,
    conversation: Sequence[Message],
    *plain: set[str],
) -> tuple[Rendering | None, str]:
    """(the rendering with the fewest additional plain roles that works, or None; the first
    problem found).
    """
    first_problem = ""
    for chosen in itertools.product(*((set(), roles) if roles else (set(),) for roles in plain)):
        roles = rendering.plain_roles.union(*chosen)
        tried = dataclasses.replace(rendering, plain_roles=roles)
        try:
            _render_whole(processor, tried, conversation)
        except _Unfit as problem:
            first_problem = first_problem or str(problem)
        else:
            return tried, ""
    return None, first_problem


def _render_whole(
    processor: Processor,
    rendering: Rendering,
    conversation: Sequence[Message],
) -> str:
    """The rendered conversation, up to the next answer if the user has the last word.

    Raises _Unfit where a part of it is missing or misspelled.
    """
    try:
        text = apply_template(
            processor,
            rendering,
            conversation,
            add_generation_prompt=conversation[-1]["role"] == "user",
        )
    except _TEMPLATE_ERRORS as problem:
        raise _Unfit(" ".join(str(problem).split()) or type(problem).__name__) from problem
    if _SPELLED_PARTS.search(text):
        raise _Unfit("it spells a message out as a Python list")
    for message in conversation:
        word = message["content"][-1]["text"]
        if word not in text:
            raise _Unfit(f"it leaves out what the {message['role']} says")
    images = sum(part["type"] == "image" for turn in conversation for part in turn["content"])
    if images and rendering.image_place and rendering.image_place not in text:
        raise _Unfit(f"it leaves out images: there is no {rendering.image_place} in the prompt")
    return text


def _with_places(processor: Processor, rendering: Rendering, model: str) -> Rendering:
    """How often the placeholder stands for each image. Raises ModelError where it varies."""
    if not rendering.image_place:
        return rendering
    system = _own_system(rendering)
    counts = [
        apply_template(
            processor,
            rendering,
            [*system, text_message("user", _FIRST, images)],
            add_generation_prompt=True,
        ).count(rendering.image_place)
        for images in (0, 1)
    ]
    if counts[0] or not counts[1]:
        raise _refused(
            model,
            f"it writes {rendering.image_place} {counts[0]} times without an image, and "
            f"{counts[1]} times for one",
        )
    return dataclasses.replace(rendering, places_per_image=counts[1])


def _own_system(rendering: Rendering) -> list[Message]:
    system = rendering.settings.system
    return [] if system is None else [text_message("system", system)]


def _with_answer(processor: Processor, rendering: Rendering, model: str) -> Rendering:
    """What stands before and behind an answer, and the end of the prompt.

    Where the generation prompt differs from what the template writes before an answer it was given
    (a header, an empty block for reasoning), the generation prompt stands.
    """
    question = [*_own_system(rendering), text_message("user", _FIRST, images=1)]
    prompt = apply_template(processor, rendering, question, add_generation_prompt=True)
    answered, spaced = (
        apply_template(processor, rendering, [*question, text_message("assistant", text)])
        for text in (_LAST_ANSWER, f"  {_LAST_ANSWER}  ")
    )
    head, _, tail = answered.partition(_LAST_ANSWER)
    between = head.removeprefix(prompt) if head.startswith(prompt) else ""
    rendering = _with_closed_thinking(rendering, prompt, between, model)
    end, end_token_id, note = _answer_end(processor, tail, model)
    return dataclasses.replace(
        rendering,
        answer_start="" if between.strip() else between,
        answer_end=end,
        end_token_id=end_token_id,
        strips_answers=f"{_LAST_ANSWER}  " not in spaced,
        notes=(*rendering.notes, *note),
    )


def _with_closed_thinking(rendering: Rendering, prompt: str, between: str, model: str) -> Rendering:
    """The rendering whose prompts leave no reasoning open, unless that was asked for."""
    tag = chat_template.open_thinking_tag(prompt)
    if tag is None:
        return rendering
    asked_for = any(rendering.variables.get(name) for name in chat_template.THINKING_SWITCHES)
    template = f"the chat template of '{model}' ends prompts in an open <{tag}>"
    if asked_for and not rendering.settings.close_thinking:
        warning = f"{template}: answers are taken as reasoning until the model closes it"
        return dataclasses.replace(rendering, warnings=(*rendering.warnings, warning))
    close = between if f"</{tag}>" in between else f"\n</{tag}>\n\n"
    warning = f"{template}: it is closed at once, because answers here hold no reasoning"
    return dataclasses.replace(rendering, prompt_end=close, warnings=(*rendering.warnings, warning))


def _answer_end(processor: Processor, tail: str, model: str) -> tuple[str, int, tuple[str, ...]]:
    """(what follows an answer, its end token, notes). Raises ModelError where nothing ends it."""
    tokenizer = processor.tokenizer
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    for token in tokenizer(tail, add_special_tokens=False)["input_ids"]:
        if token in special:
            return tail, int(token), ()
    if tokenizer.eos_token is None:
        raise _refused(model, "neither it nor the tokenizer ends an answer")
    note = (
        f"the chat template of '{model}' gives answers no end; they end in the tokenizer's "
        f"{tokenizer.eos_token}"
    )
    return tail.rstrip() + str(tokenizer.eos_token), int(tokenizer.eos_token_id), (note,)


def _missing_bos(processor: Processor, rendering: Rendering) -> str:
    """BOS where the model's own use of a prompt begins with it, and a rendered prompt has none.

    Prompts are rendered and then tokenized without special tokens, as TRL does it. A model whose
    template leaves BOS to its tokenizer (Idefics2, LLaVA) would never see it.
    """
    tokenizer: Any = processor.tokenizer
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][:1] != [bos]:
        return ""
    question = [*_own_system(rendering), text_message("user", "a", images=1)]
    prompt = apply_template(processor, rendering, question, add_generation_prompt=True)
    if bos in tokenizer(prompt, add_special_tokens=False)["input_ids"]:
        return ""
    # Some processors add BOS themselves, between images and text (PaliGemma).
    inputs = processor(
        text=[prompt],
        images=[[Image.new("RGB", (224, 224))]],
        add_special_tokens=False,
        return_tensors="pt",
    )
    return "" if bos in inputs["input_ids"][0].tolist() else str(tokenizer.bos_token)


def _sentinel(processor: Processor, rendering: Rendering) -> str:
    """A conversation as it trains, from BOS to the end of the last answer; of two turns if the
    template takes them.
    """
    turns = [text_message("user", _FIRST, images=1)]
    if "earlier turns" not in rendering.refuses:
        turns += [text_message("assistant", _ANSWER), text_message("user", _SECOND)]
    prompt = apply_template(
        processor, rendering, [*_own_system(rendering), *turns], add_generation_prompt=True
    )
    answer = rendering.answer_start + _LAST_ANSWER + rendering.answer_end
    stripped = "stripped" if rendering.strips_answers else "as it is"
    return "|".join((rendering.bos + prompt + rendering.prompt_end, answer, stripped))


def _refused(model: str, reason: str) -> ModelError:
    return ModelError(
        f"--model: the chat template of '{model}' cannot render a question about an image: {reason}"
    )
