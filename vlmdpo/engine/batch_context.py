"""What holds for one batch, across the forward passes of policy and reference.

A `BatchContext` is made for each batch and goes to the model among its other inputs, as the keyword
`batch_context`; `engine.forward.SharedForward` takes it out again. With the batch it is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vlmdpo.engine.tree_layout import TreeLayout

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

BATCH_CONTEXT = "batch_context"  # the model input by which a batch's context travels


@dataclass
class BatchContext:
    """One batch of one model.

    Attributes:
        backbone: the model this context is for; any other model ignores it.
        rows: (key of its images, image tokens) of each row, in order; empty where image features
            are not kept on disk.
        vision_is_frozen: whether nothing that makes image features trains, so that policy and
            reference share them.
        frozen_towers: modules that do not train inside a vision part that does; each runs once.
        layout_class: in place of `TreeLayout`, for checks that need a layout broken on purpose.
        layout: the packed row's, made in the first forward pass.
        position_ids: of its slots (..., 1, T), or of rows (..., 2B, S), likewise.
        image_features: what the frozen vision part returned for the batch's images.
        image_copies: how often each image is repeated in `image_features`.
        tower_outputs: what each frozen tower returned, one entry per call within a forward pass.
    """

    backbone: nn.Module
    rows: Sequence[tuple[str, int]] = ()
    vision_is_frozen: bool = False
    frozen_towers: Sequence[nn.Module] = ()
    layout_class: type[TreeLayout] | None = None
    layout: TreeLayout | None = None
    position_ids: Tensor | None = None
    image_features: ModelOutput | None = None
    image_copies: int = 1
    tower_outputs: dict[nn.Module, list[ModelOutput]] = field(default_factory=dict)

    @property
    def image_feature_bytes(self) -> int:
        """Bytes of the kept image features, each image counted once."""
        features = self.image_features
        leaves = tree_leaves(dict(features)) if features is not None else []
        return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)) // self.image_copies


@dataclass
class ForwardPass:
    """One forward pass of the backbone, for the places that transformers' code calls back into.

    Attributes:
        batch: the batch's context, if it has one.
        image_copies: how often each image stands in the batch's rows.
        add_zero_gradient_term: whether parameters outside the language model need a zero gradient,
            because this batch has no image.
        tower_calls: how often each frozen tower has been called in this pass.
    """

    batch: BatchContext | None
    image_copies: int = 1
    add_zero_gradient_term: bool = False
    tower_calls: dict[nn.Module, int] = field(default_factory=dict)

    def run_tower_once(
        self, tower: nn.Module, run: Callable[..., ModelOutput], *args: object, **kwargs: object
    ) -> ModelOutput:
        """A frozen tower's output: computed in the batch's first forward pass, without gradient."""
        assert self.batch is not None
        outputs = self.batch.tower_outputs.setdefault(tower, [])
        call = self.tower_calls.get(tower, 0)
        self.tower_calls[tower] = call + 1
        if call == len(outputs):
            with torch.no_grad():
                outputs.append(run(*args, **kwargs))
        return outputs[call]
