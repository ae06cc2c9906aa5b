"""Rows that hold more than one text: the model's own mask, evaluated where each token would stand
in a row of its own.

A layout says which index each slot has in that row and makes the mask. While `packed(layout)` is
open, models switched by `use_packed_attention` ask it; all other inputs pass as before. This module
knows nothing of pairs or questions.

Shapes: B rows, T slots, q and kv slots that ask and are asked, D head size.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from vlmdpo.models.attention import PACKED_PREFIX, default_attention
from vlmdpo.models.families import text_configs, unwrap_peft

if TYPE_CHECKING:
    from vlmdpo.models.protocols import Backbone, VisionLanguageModel

_PACKED_NAMES = {name: f"{PACKED_PREFIX}{name}" for name in ("sdpa", "eager")}
_SHAREABLE_LAYER_TYPES = {"full_attention", "sliding_attention"}


class Layout(Protocol):
    """One packed row: `mask` makes what its attention gets, of the model's own mask function.

    Either a bool (1, 1, q, kv) tensor, or a tensor-like object with a method `attend(attention,
    additive, module, query, key, value, **kwargs)` that runs attention itself.
    """

    def mask(self, mask_function: Callable[..., Tensor], device: torch.device) -> Tensor: ...


# transformers calls mask and attention functions by name, deep inside a model's forward, with
# arguments of its own: the layout of the row that is running can only reach them from outside.
_active_layout: contextvars.ContextVar[Layout | None] = contextvars.ContextVar(
    "vlmdpo_layout", default=None
)


class CannotShare(Exception):
    """Why texts of this model cannot lie in one row."""


def check_shareable(model: VisionLanguageModel) -> None:
    """Raise CannotShare where a row of this model cannot hold more than one text.

    That is so for recurrent or convolution layers, prompt-learning adapters, and attention that
    takes no mask of ours.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise CannotShare("prompt-learning adapters put tokens of their own before each row")
    config = unwrap_peft(model).config.get_text_config()
    others = set(getattr(config, "layer_types", None) or []) - _SHAREABLE_LAYER_TYPES
    if others:
        why = "carry state from token to token"
        if others == {"chunked_attention"}:  # its mask looks up how each row of a batch is padded
            why = "count from where a row begins"
        raise CannotShare(f"its layers of kind {', '.join(sorted(others))} {why}")
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager", *_PACKED_NAMES.values()) and "flash" not in attention:
        raise CannotShare(f"attention '{attention}' takes no mask of ours")


def _attention(
    attention: Callable[..., tuple[Tensor, Any]] | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """transformers' attention interface: (B, heads, T, D) in, (B, T, heads, D) out.

    Args:
        attention: the attention function behind it; None for eager attention.
    """
    additive = attention is None
    if attention is None:  # each model's module has an eager attention function of its own
        attention = sys.modules[type(module).__module__].eager_attention_forward
    attend = getattr(mask, "attend", None)
    if attend is not None:
        return attend(attention, additive, module, query, key, value, **kwargs)
    return attention(module, query, key, value, mask, **kwargs)


def _mask(
    plain_mask: Callable[..., Tensor | None],
    additive: bool,
    *,
    mask_function: Callable[..., Tensor],
    device: torch.device | str,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask interface: the layout's mask within a packed row, else the plain one."""
    layout = _active_layout.get()
    if layout is None:
        return plain_mask(mask_function=mask_function, device=device, **kwargs)
    mask = layout.mask(mask_function, torch.device(device))
    return mask if hasattr(mask, "attend") or not additive else additive_mask(mask, kwargs["dtype"])


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as eager attention wants it: 0 where allowed, else the lowest finite number."""
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(dtype).min)


# Registered under names of ours, so that models which are not switched are not touched.
AttentionInterface.register(_PACKED_NAMES["sdpa"], partial(_attention, sdpa_attention_forward))
AttentionInterface.register(_PACKED_NAMES["eager"], partial(_attention, None))
AttentionMaskInterface.register(_PACKED_NAMES["sdpa"], partial(_mask, sdpa_mask, False))
AttentionMaskInterface.register(_PACKED_NAMES["eager"], partial(_mask, eager_mask, True))


@contextlib.contextmanager
def packed(layout: Layout) -> Iterator[None]:
    """Inside, models switched by `use_packed_attention` read their input as this packed row."""
    token = _active_layout.set(layout)
    try:
        yield
    finally:
        _active_layout.reset(token)


def use_packed_attention(backbone: Backbone) -> None:
    """Switch a language model to attention that also takes packed rows.

    All other rows pass through unchanged. FlashAttention takes no mask, so its users get the
    model's own default: sdpa, which runs the same kernels where it can, or eager where SDPA cannot
    compute what the model needs.
    """
    default = default_attention(backbone)
    for config in text_configs(backbone):
        name = config._attn_implementation
        if name not in _PACKED_NAMES.values():
            config._attn_implementation = _PACKED_NAMES.get(name, _PACKED_NAMES[default])
