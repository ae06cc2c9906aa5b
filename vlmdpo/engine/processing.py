"""One call of a processor for a batch of prompts, also where it cannot batch their pictures.

Shapes: B prompts, S tokens of the longest one, n images or tiles of one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmdpo.errors import ModelError
from vlmdpo.models.inputs import inputs_by_token
from vlmdpo.models.protocols import Processor

Inputs = dict[str, Any]


class BatchingProcessor:
    """A processor that takes prompts one by one where it cannot take them together.

    Some processors stack the tiles of all images, which fails where two prompts have unlike numbers
    of them. TRL's collator is given this one in place of the model's own.

    Args:
        processor: the model's; all that is not a call is passed on to it.
    """

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self._one_by_one = False  # once it has failed on a batch that it takes one by one

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # as pickle asks before there is a processor
            raise AttributeError(name)
        return getattr(self._processor, name)

    def __call__(self, *, text: Sequence[str], images: Any = None, **options: Any) -> Inputs:
        """The processor's outputs for these texts and their images (a list for each, or None)."""
        if not self._one_by_one or len(text) == 1 or images is None:
            try:
                return dict(self._processor(text=list(text), images=images, **options))
            except (ValueError, TypeError, RuntimeError, IndexError):
                if len(text) == 1 or images is None:
                    raise
        alone = [
            dict(self._processor(text=[one], images=[its] if its else None, **options))
            for one, its in zip(text, images, strict=True)
        ]
        merged = merge_prompts(alone, self._processor.tokenizer, options.get("padding_side"))
        self._one_by_one = True
        return merged


def merge_prompts(alone: list[Inputs], tokenizer: Any, padding_side: str | None) -> Inputs:
    """The outputs of single prompts as those of a batch.

    What is by token is padded to the longest prompt. Images stand behind one another; where tiles
    have a dimension of their own, (images, tiles, ...), missing ones are zeros, as processors do.

    Raises ModelError for outputs that fit neither way.
    """
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = tokenizer.eos_token_id
    by_token = {"input_ids": padding, "attention_mask": 0}
    by_token |= {name: 0 for one in alone for name in inputs_by_token(one, one["input_ids"])}
    by_token |= {"labels": -100}
    merged: Inputs = {}
    for name in dict.fromkeys(name for one in alone for name in one):
        parts = [one[name] for one in alone if one.get(name) is not None]
        if name in by_token:
            if len(parts) < len(alone):  # types that a processor makes of prompts with images only
                parts = [one.get(name, torch.zeros_like(one["input_ids"])) for one in alone]
            merged[name] = _pad(parts, by_token[name], padding_side or tokenizer.padding_side)
        else:
            merged[name] = _join_images(name, parts)
    return merged


def _pad(rows: list[Tensor], value: int, side: str) -> Tensor:
    """(1, S_i, ...) each → (B, S, ...)."""
    longest = max(row.shape[1] for row in rows)
    padded = []
    for row in rows:
        missing = row.new_full((1, longest - row.shape[1], *row.shape[2:]), value)
        padded.append(torch.cat([missing, row] if side == "left" else [row, missing], dim=1))
    return torch.cat(padded)


def _join_images(name: str, parts: list[Any]) -> Any:
    """The images of single prompts behind one another; lists stay lists."""
    if all(isinstance(part, Tensor) for part in parts):
        unlike = {
            number
            for part in parts
            for number, (size, first) in enumerate(zip(part.shape, parts[0].shape, strict=False))
            if number and size != first
        }
        if len({part.ndim for part in parts}) == 1 and unlike <= {1}:
            most = max(part.shape[1] for part in parts) if unlike else 0
            return torch.cat([_fill(part, most) if unlike else part for part in parts])
    elif all(isinstance(part, (list, tuple)) for part in parts):
        return [value for part in parts for value in part]
    shapes = ", ".join(str(tuple(getattr(part, "shape", ()))) for part in parts[:4])
    raise ModelError(
        f"the processor cannot batch these images: '{name}' has the shapes {shapes}; use "
        "--per-device-train-batch-size 1"
    )


def _fill(part: Tensor, tiles: int) -> Tensor:
    missing = part.new_zeros((part.shape[0], tiles - part.shape[1], *part.shape[2:]))
    return torch.cat([part, missing], dim=1)
