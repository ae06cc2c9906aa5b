"""Questions being answered: the leaves of a growing tree, and what each step adds to them.

This module knows nothing of images.

Shapes: S tokens of a prompt, K active answers, q new slots of a step; positions have a leading
dimension more where a family counts time, height and width apart (M-RoPE), written "...".
"""

from __future__ import annotations

from collections.abc import Sequence
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
class Leaf:
    """One question being answered: a node of the tree, behind what all prompts begin with.

    Attributes:
        node: its number; 0 is the common beginning.
        ids: token ids of prompt and answer so far.
        position: (..., 1) position id of the last token.
        answer_ids: token ids of the answer so far.
    """

    node: int
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
        ids: (1, q) token ids.
        positions: (..., q) position ids.
        nodes: (q,) the node of each slot.
        index: (q,) the index of each slot in the row that its node would have alone.
        ends: (K,) the slots whose logits say the next token of each active answer.
    """

    ids: Tensor
    positions: Tensor
    nodes: Tensor
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
            nodes=torch.repeat_interleave(torch.arange(1, len(tails) + 1, device=device), lengths),
            index=torch.cat(
                [torch.arange(prefix, prefix + len(tail), device=device) for tail in tails]
            ),
            ends=lengths.cumsum(0) - 1,
        )

    @staticmethod
    def of_last_tokens(active: Sequence[Leaf], device: torch.device) -> Step:
        """A later step: the last token of each active answer."""
        return Step(
            ids=torch.tensor([[leaf.answer_ids[-1] for leaf in active]], device=device),
            positions=torch.cat([leaf.position for leaf in active], dim=-1),
            nodes=torch.tensor([leaf.node for leaf in active], device=device),
            index=torch.tensor([len(leaf.ids) - 1 for leaf in active], device=device),
            ends=torch.arange(len(active), device=device),
        )
