"""The shared forward: one packed pass of the unmodified model gives TRL what two stock rows would
have given.

The model's backbone is wrapped on the instance. A batch of `PairCollator` runs packed; any other
input runs as before. Image features are computed once for policy and reference where nothing that
makes them trains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vlmdpo.engine import packed_attention
from vlmdpo.engine.feature_cache import FeatureCache
from vlmdpo.engine.pair_layout import PairLayout
from vlmdpo.models import families


def check_pairs_shareable(model: Any) -> None:
    """Raise CannotShare where two answers of this model cannot be read, and trained on, in one row."""
    packed_attention.check_shareable(model)
    config = families.base_of(model).config.get_text_config()
    if getattr(config, "output_router_logits", None) is not None and getattr(
        config, "router_aux_loss_coef", None
    ):
        raise packed_attention.CannotShare(
            "its mixture-of-experts balancing loss counts whole rows"
        )


class SharedForward:
    """Lets one model run packed pairs and keep the image features of a batch. Wraps its backbone on
    the instance.

    Args:
        model: the model or PEFT model.
        share: whether batches will be packed; without it only the image features are shared.
        features: image features on disk, for a vision tower and connector that do not train.
    """

    def __init__(
        self, model: Any, *, share: bool = True, features: FeatureCache | None = None
    ) -> None:
        self.model, self.share, self.features = model, share, features
        self.backbone = families.base_of(model).base_model
        self._run: Callable[..., Any] = self.backbone.forward
        self._features: Callable[..., Any] = self.backbone.get_image_features
        self._kept: list[Any] | None = None
        self._copies = 1
        self._rows: list[tuple[int, int]] = []
        self._towers: list[_Once] = []
        self.always_whole = (
            False  # every process's backward must reach the same parameters, pictures or none
        )
        self._bare = False
        self._hook = self.backbone.get_decoder().register_forward_pre_hook(
            self._with_nothing, with_kwargs=True
        )
        language = set(map(id, self.backbone.get_decoder().modules()))
        self._outside = [module for module in self.backbone.modules() if id(module) not in language]
        self.layout_class = (
            PairLayout  # the self-check puts broken ones here, to see that it would notice
        )
        if share:
            packed_attention.use_packed_attention(families.text_configs(self.backbone))
        self.backbone.forward = families.stand_in(self._run, self._forward)
        self.backbone.get_image_features = families.stand_in(self._features, self._image_features)

    def remove(self) -> None:
        """Take the wrapping off again. The attention stays: it hands on what is not packed."""
        self.backbone.forward, self.backbone.get_image_features = self._run, self._features
        self._hook.remove()

    @property
    def vision_is_frozen(self) -> bool:
        """Whether nothing that makes image features trains, so that policy and reference see the
        same ones.
        """
        return not any(p.requires_grad for p in families.vision_parameters(self.backbone))

    def ask_no_pixel_gradients(self) -> None:
        """Take off the hooks by which patch embeddings ask for gradients: only reentrant
        checkpointing needs them.

        With them a backward pass runs through every vision layer, frozen or not, down to the
        pixels.
        """
        for module in self._outside:
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__qualname__", "").startswith(
                    "PreTrainedModel.enable_input_require_grads"
                ):
                    del module._forward_hooks[key]

    @property
    def kept_bytes(self) -> int:
        """Bytes of the frozen image features of the batch that is open, each picture's once."""
        tensors = [
            leaf
            for leaf in tree_leaves([dict(kept) for kept in self._kept or []])
            if isinstance(leaf, Tensor)
        ]
        return sum(tensor.nbytes for tensor in tensors) // (1 if self.share else 2)

    @contextlib.contextmanager
    def one_batch(self, rows: Tensor | None = None, ids: Sequence[Tensor] = ()) -> Iterator[None]:
        """Inside, all forwards are of one batch: what is frozen of the vision part runs once,
        without gradient.

        Args:
            rows: (B,) the rows' numbers, by which image features are found on disk.
            ids: the token ids of each of these rows, to count its image tokens.
        """
        frozen = self.vision_is_frozen
        self._kept = [] if frozen else None
        image = self.backbone.config.image_token_id
        tokens = [int(torch.eq(row_ids, image).sum()) for row_ids in ids]
        self._rows = [] if rows is None else list(zip(rows.tolist(), tokens, strict=True))
        self._towers = (
            [] if frozen else [_Once(tower) for tower in families.frozen_towers(self.backbone)]
        )
        try:
            yield
        finally:
            self._kept = None
            while self._towers:
                self._towers.pop().remove()

    def _image_features(self, *args: Any, **kwargs: Any) -> Any:
        if self._kept is None:
            return families.repeat_features(self._features(*args, **kwargs), self._copies)
        if not self._kept:
            self._kept.append(
                families.repeat_features(self._frozen_features(*args, **kwargs), self._copies)
            )
        return self._kept[0]

    @torch.no_grad()
    def _frozen_features(self, *args: Any, **kwargs: Any) -> Any:
        pictured = [(row, tokens) for row, tokens in self._rows if tokens]
        if self.features is None or not pictured:
            return self._features(*args, **kwargs)
        rows, tokens = zip(*pictured, strict=True)
        found = self.features.get(rows, next(self.backbone.parameters()).device)
        if found is None:
            found = self._features(*args, **kwargs)
            self.features.put(rows, tokens, found)
        return found

    def _forward(self, *args: Any, pairs: Any = None, image_copies: int = 1, **kwargs: Any) -> Any:
        for tower in self._towers:
            tower.rewind()
        self._bare = (
            self.always_whole and torch.is_grad_enabled() and kwargs.get("pixel_values") is None
        )
        return self._run_batch(*args, pairs=pairs, image_copies=image_copies, **kwargs)

    def _with_nothing(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        """Before the language model reads a batch without a picture: add `_nothing` where image
        features would have come in.

        Processes bring gradients together in the order in which backward passes reach them, which
        must be the same for all: through every language layer, and then into what makes image
        features.
        """
        if not self._bare or kwargs.get("inputs_embeds") is None:
            return None
        embedded = kwargs["inputs_embeds"]
        return args, {**kwargs, "inputs_embeds": embedded + self._nothing(embedded)}

    def _nothing(self, like: Tensor) -> Tensor:
        """Zero, whose gradients reach all that trains outside the language model."""
        trained = [p for p in families.vision_parameters(self.backbone) if p.requires_grad]
        return (
            torch.stack([0 * p.sum().to(like) for p in trained]).sum()
            if trained
            else like.new_zeros(())
        )

    def _run_batch(self, *args: Any, pairs: Any, image_copies: int, **kwargs: Any) -> Any:
        if pairs is not None:
            return self._packed(pairs, **kwargs)
        if image_copies == 1:
            return self._run(*args, **kwargs)
        self._copies = image_copies
        try:
            positions = families.positions(
                self.backbone, kwargs["input_ids"], kwargs["attention_mask"], kwargs, image_copies
            )
            return self._run(*args, **{**kwargs, "position_ids": positions})
        finally:
            self._copies = 1

    def _packed(
        self,
        pairs: list[list[int]],
        *,
        pair_ids: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        order: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """One pass over (1, T) slots; returns last hidden states (2B, 1 + C, H), as two stock rows
        would end.

        With `order` (R,) those of R rows, each one of the 2B.
        """
        layout = self.layout_class(pairs, pair_ids.device)
        types = {
            name: layout.to_rows(kwargs.pop(name))
            for name in families.TYPE_KEYS
            if kwargs.get(name) is not None
        }
        positions = families.positions(
            self.backbone, layout.to_rows(pair_ids), layout.row_mask, {**kwargs, **types}
        )
        if (
            "token_type_ids" in types
        ):  # masks are built of it; they are evaluated at indices of stock rows
            kwargs["token_type_ids"] = types["token_type_ids"]
        with packed_attention.packed(layout):
            output = self._run(
                input_ids=pair_ids,
                attention_mask=torch.ones_like(pair_ids),
                position_ids=layout.from_rows(positions),
                **kwargs,
            )
        slots = layout.hidden_slot if order is None else layout.hidden_slot[order]
        output.last_hidden_state = output.last_hidden_state[0][slots]
        return output


class _Once:
    """A frozen tower that runs once a batch, without gradient; later forwards of the batch are told
    the same again.
    """

    def __init__(self, tower: Any) -> None:
        self.tower, self.run = tower, tower.forward
        self.said: list[Any] = []
        self.rewind()
        tower.forward = self

    def rewind(self) -> None:
        """A forward of the whole model begins: its first call of the tower is the batch's first."""
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.calls == len(self.said):
            with torch.no_grad():
                self.said.append(self.run(*args, **kwargs))
        self.calls += 1
        return self.said[self.calls - 1]

    def remove(self) -> None:
        """The tower is itself again."""
        self.tower.forward = self.run
