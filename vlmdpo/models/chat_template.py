"""The chat template that a processor is given where its model ships none, or one without BOS."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from PIL import Image

from vlmdpo.models.families import fallback_chat_template
from vlmdpo.models.protocols import Processor

# Prompts are rendered by the chat template and then tokenized without special tokens, as TRL does
# it. A model whose template leaves BOS to its tokenizer (Idefics2, LLaVA) would never see it.
# The comment marks the prefix as ours, so that it is taken off where the processor is saved.
_BOS_PREFIX = "{#- vlmdpo: the tokenizer adds this one -#}{{ bos_token }}"


def complete_chat_template(processor: Any) -> None:
    """Set the template where the model ships none, and let it begin with BOS where the tokenizer
    would add one.

    `processor.chat_template` stays None where there is no template at all.
    """
    if processor.chat_template is None:
        processor.chat_template = fallback_chat_template(processor)
    template: Any = processor.chat_template
    if template is None or not _lacks_bos(processor):
        return
    if isinstance(template, dict):
        processor.chat_template = {name: _BOS_PREFIX + text for name, text in template.items()}
    else:
        processor.chat_template = _BOS_PREFIX + template


def _lacks_bos(processor: Processor) -> bool:
    """Whether the model's own use of a prompt begins with BOS, and a rendered prompt has none."""
    tokenizer: Any = processor.tokenizer
    if not _adds_bos(tokenizer):
        return False
    bos = tokenizer.bos_token_id
    content = [{"type": "image"}, {"type": "text", "text": "a"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    if bos in tokenizer(prompt, add_special_tokens=False)["input_ids"]:
        return False
    # Some processors add BOS themselves, between images and text (PaliGemma).
    image = Image.new("RGB", (224, 224))
    inputs = processor(text=[prompt], images=[[image]], add_special_tokens=False)
    return bos not in list(inputs["input_ids"][0])


def _adds_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def save_processor(processor: Processor, folder: Any) -> None:
    """Save a processor with the chat template that its model ships.

    With BOS in the template, the usual way to ask a model (render, then call the processor) would
    give it two of them.
    """
    with _as_shipped(processor):
        processor.save_pretrained(folder)


@contextlib.contextmanager
def _as_shipped(processor: Any) -> Iterator[None]:
    template: Any = processor.chat_template
    if isinstance(template, dict):
        shipped: Any = {name: text.removeprefix(_BOS_PREFIX) for name, text in template.items()}
    else:
        shipped = template.removeprefix(_BOS_PREFIX) if template else template
    processor.chat_template = shipped
    try:
        yield
    finally:
        processor.chat_template = template
