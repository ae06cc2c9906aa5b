"""The shared forward: one packed pass of the unmodified model gives TRL what two stock rows would have given.

The model's backbone is wrapped on the instance. A batch of `PairCollator` runs packed; any other input runs as
before. Image features are computed once for policy and reference where nothing that makes them trains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vlmdpo.dpo.attention import PairLayout, packed, use_pair_attention
from vlmdpo.dpo.batch import TYPE_KEYS
from vlmdpo.models import families

_SHAREABLE = {"full_attention", "sliding_attention"}


class CannotShare(Exception):
    """Why two answers of this model cannot be read in one row."""


def check_shareable(model: Any) -> None:
    """Raise CannotShare for recurrent or convolution layers, prompt-learning adapters, and attention not known here."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise CannotShare("prompt-learning adapters put tokens of their own before each row")
    config = families.base_of(model).config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or []) - _SHAREABLE
    if kinds:
        raise CannotShare(f"its layers of kind {', '.join(sorted(kinds))} carry state from token to token")
    if getattr(config, "output_router_logits", None) is not None and getattr(config, "router_aux_loss_coef", None):
        raise CannotShare("its mixture-of-experts balancing loss counts whole rows")
    if config._attn_implementation not in ("sdpa", "eager") and "flash" not in config._attn_implementation:
        raise CannotShare(f"attention '{config._attn_implementation}' takes no mask of ours")


class SharedForward:
    """Lets one model run packed pairs and keep the image features of a batch. Wraps its backbone on the instance.

    Args:
        model: the model or PEFT model.
        share: whether batches will be packed; without it only the image features are shared.
    """

    def __init__(self, model: Any, *, share: bool = True) -> None:
        self.model = model
        self.backbone = families.base_of(model).base_model
        self._run: Callable[..., Any] = self.backbone.forward
        self._features: Callable[..., Any] = self.backbone.get_image_features
        self._kept: list[Any] | None = None
        self._copies = 1
        self.layout_class = PairLayout  # the self-check puts broken ones here, to see that it would notice
        if share:
            use_pair_attention(families.text_configs(self.backbone))
        self.backbone.forward = self._forward
        self.backbone.get_image_features = self._image_features

    def remove(self) -> None:
        """Take the wrapping off again. The attention stays: it hands on what is not packed."""
        self.backbone.forward, self.backbone.get_image_features = self._run, self._features

    @property
    def vision_is_frozen(self) -> bool:
        """Whether nothing that makes image features trains, so that policy and reference see the same ones."""
        return not any(p.requires_grad for p in families.vision_parameters(self.backbone))

    @contextlib.contextmanager
    def one_batch(self) -> Iterator[None]:
        """Inside, all forwards are of one batch: frozen image features are computed once, without gradient."""
        self._kept = [] if self.vision_is_frozen else None
        try:
            yield
        finally:
            self._kept = None

    def _image_features(self, *args: Any, **kwargs: Any) -> Any:
        if self._kept is None:
            return _repeat(self._features(*args, **kwargs), self._copies)
        if not self._kept:
            with torch.no_grad():
                self._kept.append(_repeat(self._features(*args, **kwargs), self._copies))
        return self._kept[0]

    def _forward(self, *args: Any, pairs: Any = None, image_copies: int = 1, **kwargs: Any) -> Any:
        if pairs is not None:
            return self._packed(pairs, **kwargs)
        if image_copies == 1:
            return self._run(*args, **kwargs)
        self._copies = image_copies
        try:
            positions = families.positions(self.backbone, kwargs["input_ids"], kwargs["attention_mask"], kwargs, image_copies)
            return self._run(*args, **{**kwargs, "position_ids": positions})
        finally:
            self._copies = 1

    def _packed(
        self, pairs: list[list[int]], *, pair_ids: Tensor, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> Any:
        """One pass over (1, T) slots; returns last hidden states (2B, 1 + C, H), as two stock rows would end."""
        layout = self.layout_class(pairs, pair_ids.device)
        types = {name: layout.to_rows(kwargs.pop(name)) for name in TYPE_KEYS if kwargs.get(name) is not None}
        positions = families.positions(self.backbone, layout.to_rows(pair_ids), layout.row_mask, {**kwargs, **types})
        if "token_type_ids" in types:  # masks are built of it; they are evaluated at indices of stock rows
            kwargs["token_type_ids"] = types["token_type_ids"]
        with packed(layout):
            output = self._run(
                input_ids=pair_ids,
                attention_mask=torch.ones_like(pair_ids),
                position_ids=layout.from_rows(positions),
                **kwargs,
            )
        output.last_hidden_state = output.last_hidden_state[0][layout.hidden_slot]
        return output


def _repeat(value: Any, copies: int) -> Any:
    """Image features as if every image stood `copies` times in the batch, the whole list after itself."""
    if copies == 1 or value is None:
        return value
    for name in ("pooler_output", "deepstack_features"):
        part = getattr(value, name, None)
        if isinstance(part, Tensor):
            value[name] = torch.cat([part] * copies)
        elif name == "pooler_output" and part is not None:
            value[name] = tuple(part) * copies
        elif part is not None:
            value[name] = [
                tuple(layer) * copies if not isinstance(layer, Tensor) else torch.cat([layer] * copies) for layer in part
            ]
    return value
