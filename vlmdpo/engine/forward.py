"""The shared forward: one packed pass of the unmodified model gives TRL what stock rows give.

The model and its backbone are wrapped on the instance. Batches of `PairCollator` run packed; any
other input runs as before. Where nothing that makes image features trains, they are computed once
for policy and reference.

Shapes: B pairs, R rows of TRL's loss, D distinct answers, P distinct prompts, T slots of the packed
row, S length of the longest stock row, C tokens of the longest answer, H hidden size.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmdpo.engine import packed_attention
from vlmdpo.engine.batch_context import BatchContext, ForwardPass
from vlmdpo.engine.feature_cache import FeatureCache
from vlmdpo.engine.tree import Forest
from vlmdpo.engine.tree_layout import TreeLayout
from vlmdpo.errors import ModelError
from vlmdpo.models import families
from vlmdpo.models.attention import overlays_mask
from vlmdpo.models.inputs import has_images, image_token_id, inputs_by_token
from vlmdpo.models.protocols import VisionLanguageModel

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

# transformers' own code stands between a backbone's `forward` and what it calls back into (image
# features, towers, the decoder), and passes no argument of ours through. It is set for the duration
# of one forward pass.
_forward_pass: contextvars.ContextVar[ForwardPass | None] = contextvars.ContextVar(
    "vlmdpo_forward_pass", default=None
)


def check_pairs_shareable(model: VisionLanguageModel, router_loss: float | None = None) -> None:
    """Raise CannotShare where this model cannot read, and train on, two answers in one row.

    Args:
        router_loss: the coefficient that TRL is given for the balancing loss of a mixture of
            experts; None for the model's own.
    """
    packed_attention.check_shareable(model)
    config = families.unwrap_peft(model).config.get_text_config()
    # As TRL decides it.
    if router_loss is None:
        router_loss = getattr(config, "router_aux_loss_coef", 0.0)
    if hasattr(config, "output_router_logits") and router_loss:
        raise packed_attention.CannotShare(
            "its mixture-of-experts balancing loss counts whole rows"
        )


class SharedForward:
    """Lets one model run packed pairs and reuse the image features of a batch.

    Args:
        model: the model or PEFT model. Methods of its backbone are wrapped until `remove`.
        share: whether batches will be packed; without it only image features are shared.
        features: image features on disk, for a vision tower and connector that do not train.
        gradient_in_every_batch: whether a batch without images must still give the vision part a
            (zero) gradient, as several processes need.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        *,
        share: bool = True,
        features: FeatureCache | None = None,
        gradient_in_every_batch: bool = False,
    ) -> None:
        self.model, self.share, self.features = model, share, features
        self.gradient_in_every_batch = gradient_in_every_batch
        self._headed = families.unwrap_peft(model)
        self.backbone = self._headed.base_model
        self._headed_forward: Callable[..., ModelOutput] = self._headed.forward
        self._backbone_forward: Callable[..., ModelOutput] = self.backbone.forward
        self._get_image_features: Callable[..., ModelOutput] = self.backbone.get_image_features
        self._tower_forwards = {
            tower: tower.forward for tower in families.vision_models(self.backbone)
        }
        self._masks_by_type = overlays_mask(type(self.backbone).__module__)
        language = set(map(id, self.backbone.get_decoder().modules()))
        self._vision_modules = [m for m in self.backbone.modules() if id(m) not in language]
        if share:
            packed_attention.use_packed_attention(self.backbone)
        self._wrap()

    def _wrap(self) -> None:
        # The classes are transformers' and stay unmodified: only this instance's methods change.
        self.backbone.forward = families.keep_signature(self._backbone_forward, self._forward)
        # TRL's head is in the whole model's, also on the instance.
        self._wrapped_forward = families.keep_signature(
            self._headed_forward, self._forward_with_head
        )
        self._headed.forward = self._wrapped_forward
        # Called by the backbone's own forward; so is each tower.
        self.backbone.get_image_features = families.keep_signature(
            self._get_image_features, self._image_features
        )
        for tower, run in self._tower_forwards.items():
            tower.forward = families.keep_signature(run, partial(self._tower_forward, tower, run))
        self._decoder_hook = self.backbone.get_decoder().register_forward_pre_hook(
            self._add_zero_gradient_term, with_kwargs=True
        )

    def remove(self) -> None:
        """Unwrap the model. Its attention stays switched: it passes unpacked rows through."""
        # accelerate may have wrapped it since, for autocast; then ours stays inside, and passes
        # through what has no `order`.
        if self._headed.forward is self._wrapped_forward:
            self._headed.forward = self._headed_forward
        self.backbone.forward = self._backbone_forward
        self.backbone.get_image_features = self._get_image_features
        for tower, run in self._tower_forwards.items():
            tower.forward = run
        self._decoder_hook.remove()

    @property
    def vision_is_frozen(self) -> bool:
        """Whether nothing that makes image features trains: policy and reference see the same."""
        return not any(p.requires_grad for p in families.vision_parameters(self.backbone))

    def new_batch(
        self,
        image_keys: Sequence[str] = (),
        ids: Sequence[Tensor] = (),
        layout_class: type[TreeLayout] | None = None,
    ) -> BatchContext:
        """The context of a new batch, to be given to the model as its input `batch_context`.

        Args:
            image_keys: of the B rows, by which image features are found on disk.
            ids: the token ids of each of these rows, to count its image tokens.
            layout_class: see `BatchContext`.
        """
        frozen = self.vision_is_frozen
        rows: list[tuple[str, int]] = []
        if self.features is not None and image_keys:
            image_token = image_token_id(self.backbone.config)
            if image_token is None:
                raise ModelError("--feature-cache: the model's configuration names no image token")
            counts = torch.stack([torch.eq(row_ids, image_token).sum() for row_ids in ids])
            rows = list(zip(image_keys, counts.tolist(), strict=True))
        return BatchContext(
            backbone=self.backbone,
            rows=rows,
            vision_is_frozen=frozen,
            frozen_towers=[] if frozen else families.frozen_towers(self.backbone),
            layout_class=layout_class,
        )

    def remove_input_gradient_hooks(self) -> None:
        """Remove the hooks that make the outputs of patch embeddings require gradients.

        `PreTrainedModel.enable_input_require_grads` registers them, and only reentrant
        checkpointing needs them. With them a backward pass runs through every vision layer, frozen
        or not, down to the pixels.
        """
        for module in self._vision_modules:
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__qualname__", "").startswith(
                    "PreTrainedModel.enable_input_require_grads"
                ):
                    del module._forward_hooks[key]

    def _forward_with_head(
        self,
        *args: Any,
        order: Tensor | None = None,
        order_back: Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """In place of the model's forward: score each distinct answer once, for all its rows.

        Args:
            order: (R,) which distinct answer each row of the loss is; None for one row each.
            order_back: (D,) a row of the loss for each distinct answer.
        """
        if order is None or order_back is None:
            return self._headed_forward(*args, **kwargs)
        labels_R = kwargs.pop("labels")
        output = self._headed_forward(*args, labels=labels_R[order_back], **kwargs)
        in_loss = labels_R[:, 1:] != -100  # mDPO's anchor repeats a row without its answer
        for name, values in output.items():
            if isinstance(values, Tensor) and values.shape[:1] == order_back.shape:
                output[name] = values[order].masked_fill(~in_loss, 0)
        return output

    def _forward(
        self,
        *args: Any,
        forest: Forest | None = None,
        image_copies: int = 1,
        batch_context: BatchContext | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """In place of the backbone's forward: takes our own inputs out and runs it."""
        if batch_context is not None and batch_context.backbone is not self.backbone:
            # A reference model of its own has a vision part of its own, which may differ.
            batch_context = None
        this_pass = ForwardPass(
            batch_context,
            image_copies=1 if forest is not None else image_copies,
            add_zero_gradient_term=self.gradient_in_every_batch
            and torch.is_grad_enabled()
            and not has_images(kwargs),
        )
        token = _forward_pass.set(this_pass)
        try:
            if forest is not None:
                return self._packed_forward(forest, batch_context, **kwargs)
            if image_copies > 1:
                kwargs["position_ids"] = self._row_positions(image_copies, batch_context, kwargs)
            return self._backbone_forward(*args, **kwargs)
        finally:
            _forward_pass.reset(token)

    def _row_positions(
        self, copies: int, batch: BatchContext | None, inputs: dict[str, Any]
    ) -> Tensor:
        """Position ids of stock rows (..., 2B, S) whose images are given once."""
        batch = batch or BatchContext(self.backbone)
        if batch.position_ids is None:
            grids = inputs.get("image_grid_thw")
            batch.position_ids = families.stock_position_ids(
                self.backbone,
                inputs["input_ids"],
                inputs["attention_mask"],
                inputs,
                None if grids is None else [*range(len(grids))] * copies,
            )
        return batch.position_ids

    def _packed_forward(
        self,
        forest: Forest,
        batch_context: BatchContext | None,
        *,
        tree_ids: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        **kwargs: Any,
    ) -> ModelOutput:
        """One pass over (1, T) slots: the hidden states (D, 1 + C, H) that stock rows end with.

        Args:
            forest: what lies in which slots.
            tree_ids: (1, T) token ids.
            input_ids, attention_mask: (R, 1 + C), (R, S) for TRL's loss; not read here.
        """
        batch = batch_context or BatchContext(self.backbone)
        if batch.layout is None:
            batch.layout = (batch.layout_class or TreeLayout)(forest, tree_ids.device)
        layout = batch.layout
        types_1T = inputs_by_token(kwargs, tree_ids)
        types_PS = {name: layout.slots_to_rows(types) for name, types in types_1T.items()}
        if batch.position_ids is None:
            rows_PS = layout.slots_to_rows(tree_ids)
            positions_PS = families.stock_position_ids(
                self.backbone,
                rows_PS,
                layout.row_mask,
                {**kwargs, **types_PS},
                layout.image_rows(),
            )
            batch.position_ids = layout.rows_to_slots(positions_PS)
        if self._masks_by_type:
            # The model builds its mask function of them, which is evaluated at indices of stock
            # rows.
            kwargs |= types_PS
        with packed_attention.packed(layout):
            output = self._backbone_forward(
                input_ids=tree_ids,
                attention_mask=torch.ones_like(tree_ids),
                position_ids=batch.position_ids,
                **kwargs,
            )
        hidden_TH = output.last_hidden_state[0]
        output.last_hidden_state = hidden_TH[layout.answer_slots]  # (D, 1 + C, H)
        return output

    def _image_features(self, *args: Any, **kwargs: Any) -> ModelOutput:
        """In place of `get_image_features`: once per batch where the vision part is frozen."""
        this_pass = _forward_pass.get()
        copies = this_pass.image_copies if this_pass is not None else 1
        batch = this_pass.batch if this_pass is not None else None
        if batch is None or not batch.vision_is_frozen:
            return families.repeat_features(self._get_image_features(*args, **kwargs), copies)
        if batch.image_features is None:
            features = self._frozen_image_features(batch, *args, **kwargs)
            batch.image_features = families.repeat_features(features, copies)
            batch.image_copies = copies
        return batch.image_features

    @torch.no_grad()
    def _frozen_image_features(self, batch: BatchContext, *args: Any, **kwargs: Any) -> ModelOutput:
        with_images = [(key, tokens) for key, tokens in batch.rows if tokens]
        if self.features is None or not with_images:
            return self._get_image_features(*args, **kwargs)
        keys, tokens = zip(*with_images, strict=True)
        features = self.features.get(keys, next(self.backbone.parameters()).device)
        if features is None:
            features = self._get_image_features(*args, **kwargs)
            self.features.put(keys, tokens, features)
        return features

    def _tower_forward(
        self, tower: nn.Module, run: Callable[..., ModelOutput], *args: Any, **kwargs: Any
    ) -> ModelOutput:
        """In place of a tower's forward: once per batch where the tower is frozen."""
        this_pass = _forward_pass.get()
        batch = this_pass.batch if this_pass is not None else None
        if this_pass is None or batch is None or tower not in batch.frozen_towers:
            return run(*args, **kwargs)
        return this_pass.run_tower_once(tower, run, *args, **kwargs)

    def _add_zero_gradient_term(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        """Before the language model reads a batch without images: add `_zero_gradient_term`.

        Processes average gradients in the order in which backward passes reach them, which must be
        the same for all: through every language layer, and then into what makes image features.
        """
        this_pass = _forward_pass.get()
        if this_pass is None or not this_pass.add_zero_gradient_term:
            return None
        if kwargs.get("inputs_embeds") is None:
            return None
        embeds = kwargs["inputs_embeds"]
        return args, {**kwargs, "inputs_embeds": embeds + self._zero_gradient_term(embeds)}

    def _zero_gradient_term(self, like: Tensor) -> Tensor:
        """A scalar zero whose gradients reach all that trains outside the language model."""
        trained = [p for p in families.vision_parameters(self.backbone) if p.requires_grad]
        if not trained:
            return like.new_zeros(())
        return torch.stack([0 * p.sum().to(like) for p in trained]).sum()
