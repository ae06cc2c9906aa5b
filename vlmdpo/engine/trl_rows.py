"""Rows of TRL's vision-preference format → batches of the engine, rendered as TRL renders them.

TRL's own functions make the texts, so that the tokens of a drop-in run are those of a TRL run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from PIL import Image
from trl.data_utils import (
    apply_chat_template,
    extract_prompt,
    is_conversational,
    prepare_multimodal_messages,
)

from vlmdpo import ui
from vlmdpo.data.pairs import SIDES
from vlmdpo.data.reasons import BadRow
from vlmdpo.engine.collate import Example, PairCollator, render_example
from vlmdpo.errors import VlmDpoError
from vlmdpo.models.protocols import Processor

_TEXTS = ("prompt", *SIDES)


def rendered(processor: Processor, example: Example) -> Example:
    """A row {images or image, [prompt,] chosen, rejected} as TRL's collator renders it.

    Returns {images: a list, prompt, chosen, rejected: texts}; a row that is so already is not
    changed. Raises what TRL raises for a row that it cannot render.
    """
    if "prompt" not in example:  # both answers begin with it
        example = {**example, **extract_prompt(example)}
    image = example.get("image")
    # A single image goes first, as in TRL.
    images = [image] if image is not None else list(example.get("images") or [])
    texts: Example = {name: example[name] for name in _TEXTS}
    if is_conversational(texts):
        texts["prompt"] = prepare_multimodal_messages(texts["prompt"], images=images)
        for side in SIDES:
            texts[side] = prepare_multimodal_messages(texts[side])
        if example.get("chat_template_kwargs"):
            texts["chat_template_kwargs"] = example["chat_template_kwargs"]
        texts = apply_chat_template(texts, processor)
    return {"images": images, **{name: texts[name] for name in _TEXTS}}


def is_rendered_as_asked(processor: Processor, example: Example) -> bool:
    """Whether the commands, which ask a trained model, render this row as TRL does.

    Args:
        example: as of `rendered`; texts that are rendered already are taken as they are.
    """
    texts = rendered(processor, example)
    if "prompt" not in example or not is_conversational(example):
        return True
    prompt = prepare_multimodal_messages(example["prompt"], images=texts["images"])
    answers = {side: prepare_multimodal_messages(example[side]) for side in SIDES}
    try:
        # A copy: what is found of a chat template is kept on the processor.
        asked = render_example(copy.copy(processor), {"prompt": prompt, **answers})
    except (VlmDpoError, BadRow):
        return False
    return all(asked[name] == texts[name] for name in _TEXTS)


class TrlRowsCollator:
    """Rows of TRL's format → a batch of the engine, or of TRL where the engine cannot take them.

    Args:
        pairs: makes the engine's batch.
        stock: TRL's own collator.
    """

    def __init__(
        self, pairs: PairCollator, stock: Callable[[list[Example]], dict[str, Any]]
    ) -> None:
        self.pairs, self.stock = pairs, stock
        self._has_warned = False

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """A `batch.PairBatch`, or what TRL makes of these rows. Raises what TRL raises."""
        rows = [rendered(self.pairs.processor, example) for example in examples]
        reason = _why_not_images(rows)
        if reason is None:
            try:
                return self.pairs(rows)
            except VlmDpoError as problem:  # a prompt that fills `max_length`, an empty answer
                reason = str(problem)
        self._warn(reason)
        return self.stock(rows)

    def _warn(self, reason: str) -> None:
        if not self._has_warned:  # once in each process that collates
            ui.warn(f"a batch runs as TRL's own rows, and later ones may too: {reason}")
            self._has_warned = True


def _why_not_images(rows: list[Example]) -> str | None:
    """Why the images of these rows have no key by their content; None if they have one."""
    for row in rows:
        for image in row["images"]:
            if not isinstance(image, Image.Image):
                return f"an image is a {type(image).__name__}, not a PIL image"
    return None
