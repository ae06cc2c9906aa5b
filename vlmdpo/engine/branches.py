"""Branches behind a shared prefix: the prompts of many questions, and their answers, in one row.

Each branch sees the prefix and itself, and no other branch. This module knows nothing of images.

Shapes: P tokens of the shared prefix, N new slots of a step, A slots of all steps so far, K active
branches; positions have a leading dimension more where a family counts time, height and width apart
(M-RoPE), written "..." here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One processed question.

    Attributes:
        ids: its token ids.
        positions: (..., S) their position ids.
        types: (1, S) their token types, by name, where the family has them.
    """

    ids: list[int]
    positions: Tensor
    types: dict[str, Tensor]


@dataclass
class Branch:
    """One question being answered.

    Attributes:
        number: its place among the questions.
        ids: token ids of prompt and answer so far.
        position: (..., 1) position id of the last token.
        answer_ids: token ids of the answer so far.
    """

    number: int
    ids: list[int]
    position: Tensor
    answer_ids: list[int] = field(default_factory=list)

    def append(self, token: int) -> None:
        """Add the answer's next token."""
        self.answer_ids.append(token)
        self.ids.append(token)
        self.position = self.position + 1


@dataclass(frozen=True)
class Step:
    """What one forward pass adds to the row.

    Attributes:
        ids: (1, N) token ids.
        positions: (..., N) position ids.
        branch: (N,) the branch of each slot.
        index: (N,) the index of each slot in the row that its branch would have alone.
        ends: (K,) the slots whose logits say the next token of each active branch.
    """

    ids: Tensor
    positions: Tensor
    branch: Tensor
    index: Tensor
    ends: Tensor

    @staticmethod
    def of_prompts(prompts: Sequence[Prompt], prefix: int, device: torch.device) -> Step:
        """The first step: what follows the shared prefix of `prefix` tokens in each prompt."""
        tails = [prompt.ids[prefix:] for prompt in prompts]
        lengths = torch.tensor([len(tail) for tail in tails], device=device)
        return Step(
            ids=torch.tensor([list(chain(*tails))], device=device),
            positions=torch.cat([prompt.positions[..., prefix:] for prompt in prompts], dim=-1),
            branch=torch.repeat_interleave(torch.arange(len(tails), device=device), lengths),
            index=torch.cat(
                [torch.arange(prefix, prefix + len(tail), device=device) for tail in tails]
            ),
            ends=lengths.cumsum(0) - 1,
        )

    @staticmethod
    def of_last_tokens(active: Sequence[Branch], device: torch.device) -> Step:
        """A later step: the last token of each active branch."""
        return Step(
            ids=torch.tensor([[branch.answer_ids[-1] for branch in active]], device=device),
            positions=torch.cat([branch.position for branch in active], dim=-1),
            branch=torch.tensor([branch.number for branch in active], device=device),
            index=torch.tensor([len(branch.ids) - 1 for branch in active], device=device),
            ends=torch.arange(len(active), device=device),
        )


class BranchLayout:
    """The slots of branches behind a shared prefix. A `packed_attention.Layout`.

    Args:
        prefix: slots of the prefix, whose keys and values are cached.
        device: where masks are needed.
    """

    def __init__(self, prefix: int, device: torch.device) -> None:
        self.prefix = prefix
        self.index = torch.empty(0, dtype=torch.long, device=device)
        self.branch = torch.empty(0, dtype=torch.long, device=device)
        self.new = 0

    def extend(self, step: Step) -> None:
        """Add the slots of a step, which the next mask is for."""
        self.branch = torch.cat([self.branch, step.branch])
        self.index = torch.cat([self.index, step.index])
        self.new = len(step.branch)

    def mask(self, mask_function: Callable[..., Tensor], device: torch.device) -> Tensor:
        """(1, 1, N, P + A) bool, of the model's own mask function."""
        # Batch and head, of the indices' dimensions: a mask function that indexes with a number
        # would read it from the device.
        zero = torch.zeros((1, 1), dtype=torch.long, device=device)
        query_index_N = self.index[-self.new :]
        key_index_K = torch.cat([torch.arange(self.prefix, device=device), self.index])
        own_NA = self.branch[-self.new :, None] == self.branch[None, :]
        own_NK = torch.cat([own_NA.new_ones(self.new, self.prefix), own_NA], dim=1)
        allowed_NK = mask_function(zero, zero, query_index_N[:, None], key_index_K[None, :])
        return (allowed_NK & own_NK)[None, None]


def common_prefix(prompts: Sequence[Prompt]) -> int:
    """How many tokens all prompts begin with, leaving each prompt at least one."""
    length = 0
    for column in zip(*(prompt.ids for prompt in prompts), strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return min(length, min(len(prompt.ids) for prompt in prompts) - 1)
