"""Rows that hold more than one text: the model's own mask, evaluated where each token would stand
in a row of its own.

A layout says which index each slot has in that row and makes the mask; while `packed(layout)` is
open, models that `use_packed_attention` switched ask it. All other inputs pass as before. Knows
nothing of pairs or questions.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

_NAMES = {"sdpa": "vlmdpo_packed_sdpa", "eager": "vlmdpo_packed_eager"}
_SHAREABLE = {"full_attention", "sliding_attention"}


class Layout(Protocol):
    """One packed row: `mask` makes what its attention is given, of the model's own mask function.

    Either a bool (1, 1, q, kv) tensor, or a tensor-like object with a method `attend(plain,
    additive, module, query, key, value, **kwargs)` that runs attention itself.
    """

    def mask(self, allowed: Callable[..., Tensor], device: torch.device) -> Any: ...


_active: contextvars.ContextVar[Layout | None] = contextvars.ContextVar(
    "vlmdpo_layout", default=None
)


class CannotShare(Exception):
    """Why texts of this model cannot lie in one row."""


def check_shareable(model: Any) -> None:
    """Raise CannotShare for recurrent or convolution layers, prompt-learning adapters, and
    attention not known here.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise CannotShare("prompt-learning adapters put tokens of their own before each row")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or []) - _SHAREABLE
    if kinds:
        raise CannotShare(
            f"its layers of kind {', '.join(sorted(kinds))} carry state from token to token"
        )
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager", *_NAMES.values()) and "flash" not in attention:
        raise CannotShare(f"attention '{attention}' takes no mask of ours")


def _attend(
    plain: Callable[..., Any] | None,
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    **kwargs: Any,
) -> Any:
    """transformers' attention interface: (B, heads, T, d) in, (B, T, heads, d) out."""
    additive = plain is None
    if plain is None:  # eager attention is each model's own function
        plain = sys.modules[type(module).__module__].eager_attention_forward
    own = getattr(mask, "attend", None)
    if own is not None:
        return own(plain, additive, module, query, key, value, **kwargs)
    return plain(module, query, key, value, mask, **kwargs)


def _mask(
    plain: Callable[..., Any], additive: bool, *, mask_function: Any, device: Any, **kwargs: Any
) -> Any:
    """transformers' mask interface: the layout's mask while a packed row is running, else the plain
    one.
    """
    layout = _active.get()
    if layout is None:
        return plain(mask_function=mask_function, device=device, **kwargs)
    made = layout.mask(mask_function, torch.device(device))
    return made if hasattr(made, "attend") or not additive else additive_mask(made, kwargs["dtype"])


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as eager attention wants it: zeros, and the lowest number where nothing may be
    seen.
    """
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(dtype).min)


AttentionInterface.register(_NAMES["sdpa"], partial(_attend, sdpa_attention_forward))
AttentionInterface.register(_NAMES["eager"], partial(_attend, None))
AttentionMaskInterface.register(_NAMES["sdpa"], partial(_mask, sdpa_mask, False))
AttentionMaskInterface.register(_NAMES["eager"], partial(_mask, eager_mask, True))


@contextlib.contextmanager
def packed(layout: Layout) -> Iterator[None]:
    """While open, language models that `use_packed_attention` switched read their input as this
    packed row.
    """
    token = _active.set(layout)
    try:
        yield
    finally:
        _active.reset(token)


def use_packed_attention(configs: Sequence[Any]) -> None:
    """Switch these text configurations to attention that also takes packed rows; all else it hands
    on unchanged.

    FlashAttention takes no mask, so its users get sdpa, which runs the same kernels where it can.
    """
    for config in configs:
        name = config._attn_implementation
        if name not in _NAMES.values():
            config._attn_implementation = _NAMES.get(name, _NAMES["sdpa"])
