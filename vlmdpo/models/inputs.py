"""What a processor makes of text and images, told apart by shape and type, not by a family's names.

Shapes: B rows, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What TRL and vlmdpo put beside a processor's outputs; none of them holds pixels.
_OF_TEXT = frozenset({"input_ids", "attention_mask", "completion_mask", "labels", "tree_ids"})
# What no device needs and no model takes: row numbers, and keys of images and answers.
_HOST_ONLY = ("row", "image_keys", "answer_keys")
_OF_BATCH = frozenset(
    {*_HOST_ONLY, "forest", "image_copies", "order", "order_back", "batch_context"}
)
_IMAGE_TOKEN_NAMES = ("image_token_id", "image_token_index", "image_patch_id")


def take_host_only(inputs: dict[str, Any]) -> tuple[list[int], list[str], list[str]]:
    """Take row numbers, image keys and answer keys out of a batch; each may be empty."""
    rows, image_keys, answer_keys = (inputs.pop(name, []) for name in _HOST_ONLY)
    return rows, image_keys, answer_keys


def inputs_by_token(inputs: Mapping[str, Any], ids: Tensor) -> dict[str, Tensor]:
    """The inputs, besides ids and mask, that hold a whole number for each token of `ids` (B, S)."""
    return {
        name: value
        for name, value in inputs.items()
        if name not in _OF_TEXT
        and isinstance(value, Tensor)
        and not value.is_floating_point()
        and value.shape[:2] == ids.shape
    }


def image_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a batch that come from its images: all but ids, masks and token types."""
    ids = batch.get("tree_ids", batch["input_ids"])
    by_token = inputs_by_token(batch, ids)
    return {
        name: value
        for name, value in batch.items()
        if name not in _OF_TEXT | _OF_BATCH and name not in by_token
    }


def pixels_in(values: Iterable[Any]) -> Iterator[Any]:
    """Those values that hold pixels: floating tensors, and lists of them."""
    for value in values:
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(first, Tensor) and first.is_floating_point():
            yield value


def has_images(inputs: Mapping[str, Any]) -> bool:
    """Whether a model's inputs hold the pixels of an image."""
    others = ("inputs_embeds", *_OF_TEXT)
    values = (value for name, value in inputs.items() if name not in others)
    return next(pixels_in(values), None) is not None


def other_pixels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with other images of the same sizes: upside down, and negative.

    Pixels are whatever is floating among the images' inputs, of any rank, in tensors or lists.
    """

    def change(value: Tensor) -> Tensor:
        # Rows of pixels, but of flattened patches (patches, values) the order of the patches.
        return -value.flip(0 if value.ndim <= 2 else -2)

    return {**batch, **{name: _floating(change, v) for name, v in image_inputs(batch).items()}}


def in_dtype(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs with the floating ones, pixels, in `dtype`; TRL's reference log-probs stay."""
    return {
        name: value if name.startswith("ref_") else _floating(lambda t: t.to(dtype), value)
        for name, value in inputs.items()
    }


def _floating(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with its floating tensors changed: itself, or those in its lists."""
    if isinstance(value, (list, tuple)):
        return type(value)(_floating(change, part) for part in value)
    return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def image_token_id(config: PreTrainedConfig) -> int | None:
    """The id of the token that image features replace; None where a configuration names none."""
    for name in _IMAGE_TOKEN_NAMES:
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    return None
