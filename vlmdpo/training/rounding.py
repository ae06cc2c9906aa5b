"""How exact log-probs can be: what one more rounding of a model's embeddings does to them.

Shapes: B rows, S tokens of a row, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmdpo.models import families

if TYPE_CHECKING:
    from torch import nn

    from vlmdpo.models.protocols import VisionLanguageModel


@contextlib.contextmanager
def one_more_rounding(model: VisionLanguageModel) -> Iterator[None]:
    """Inside, the model's text embeddings are off by one unit in the last place.

    Every other one is larger, and the rest smaller. How much log-probs move then is how exact they
    can be. Other padding would not tell: it often changes nothing at all.
    """

    def nudge(module: nn.Module, args: Any, embeddings_BSH: Tensor) -> Tensor:
        step = torch.finfo(embeddings_BSH.dtype).eps
        signs_H = torch.ones(embeddings_BSH.shape[-1], device=embeddings_BSH.device)
        signs_H[::2] = -1
        return (embeddings_BSH * (1 + step * signs_H)).to(embeddings_BSH.dtype)

    embeddings = families.unwrap_peft(model).get_input_embeddings()
    hook = embeddings.register_forward_hook(nudge)
    try:
        yield
    finally:
        hook.remove()
