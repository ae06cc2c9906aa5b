"""Whether a model's mask function is plainly causal, decided without asking the device.

Attention without a mask runs faster, and building masks to find out would wait for the device in
every forward pass. So the kind of function decides.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

MaskFunction = Callable[..., Tensor]

# (slots up to which a function is causal, from which it is not), by `_fingerprint`: a function that
# is causal among some slots is so among fewer.
_known: dict[Hashable, tuple[int, float]] = {}


def is_plainly_causal(mask_function: MaskFunction, slots: int) -> bool:
    """Whether each of a row's first `slots` tokens sees itself and all tokens before it.

    A function of the batch's own tensors, such as where its images lie, counts as not causal.
    """
    if mask_function is causal_mask_function:
        return True
    key = _fingerprint(mask_function)
    if key is None:
        return False
    causal, not_causal = _known.get(key, (0, float("inf")))
    if causal < slots < not_causal:
        if _is_causal(mask_function, slots):
            causal = slots
        else:
            not_causal = slots
        _known[key] = causal, not_causal
    return slots <= causal


def _is_causal(mask_function: MaskFunction, slots: int) -> bool:
    index, zero = torch.arange(slots), torch.zeros((1, 1), dtype=torch.long)
    allowed = mask_function(zero, zero, index[:, None], index[None, :])
    return bool((allowed == (index[None, :] <= index[:, None])).all())


def _fingerprint(value: Any) -> Hashable | None:
    """The same for functions that do the same; None for one that holds tensors or other objects."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return (type(value).__name__, value)
    if isinstance(value, (tuple, list)):
        return _all([_fingerprint(part) for part in value])
    if isinstance(value, partial):
        return _fingerprint([value.func, *value.args, *map(list, sorted(value.keywords.items()))])
    code = getattr(value, "__code__", None)
    if code is None:
        return None
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    inside = _fingerprint([*cells, *(value.__defaults__ or ())])
    return None if inside is None else (code, inside)


def _all(parts: list[Hashable | None]) -> Hashable | None:
    return None if None in parts else tuple(parts)
