"""Questions being answered: the leaves of a growing tree, and what each step adds to it.

    prefix ─┬─ question 1 ─┬─ answer
            │              └─ answer
            └─ question 2 ─── answer

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
    """One answer that grows behind its prompt.

    Attributes:
        prompt: what it answers; answers to the same object share it in the tree.
        draws: where its random numbers come from; None for a greedy answer.
        answer_ids: token ids of the answer so far.
        node: its number in the tree that it grows in.
    """

    prompt: Prompt
    draws: torch.Generator | None = None
    answer_ids: list[int] = field(default_factory=list)
    node: int = 0

    @property
    def ids(self) -> list[int]:
        """Token ids of prompt and answer so far."""
        return [*self.prompt.ids, *self.answer_ids]

    @property
    def position(self) -> Tensor:
        """(..., 1) position id of the last token."""
        return self.prompt.positions[..., -1:] + len(self.answer_ids)


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
    def of_prompts(
        prompts: Sequence[Prompt], parents: Sequence[int], prefix: int, device: torch.device
    ) -> Step:
        """The first step: what follows the shared prefix of `prefix` tokens in each prompt.

        Args:
            prompts: nodes 1, 2 and so on.
            parents: (K,) the node of each answer's prompt.
        """
        tails = [prompt.ids[prefix:] for prompt in prompts]
        lengths = torch.tensor([len(tail) for tail in tails], device=device)
        last_slots = lengths.cumsum(0) - 1
        return Step(
            ids=torch.tensor([list(chain(*tails))], device=device),
            positions=torch.cat([prompt.positions[..., prefix:] for prompt in prompts], dim=-1),
            nodes=torch.repeat_interleave(torch.arange(1, len(tails) + 1, device=device), lengths),
            index=torch.cat(
                [torch.arange(prefix, prefix + len(tail), device=device) for tail in tails]
            ),
            ends=last_slots[torch.tensor(parents, device=device) - 1],
        )

    @staticmethod
    def of_last_tokens(active: Sequence[Leaf], device: torch.device) -> Step:
        """A later step: the last token of each active answer."""
        index = [len(leaf.prompt.ids) + len(leaf.answer_ids) - 1 for leaf in active]
        return Step(
            ids=torch.tensor([[leaf.answer_ids[-1] for leaf in active]], device=device),
            positions=torch.cat([leaf.position for leaf in active], dim=-1),
            nodes=torch.tensor([leaf.node for leaf in active], device=device),
            index=torch.tensor(index, device=device),
            ends=torch.arange(len(active), device=device),
        )


def plant(leaves: Sequence[Leaf]) -> tuple[list[Prompt], list[int]]:
    """Number the nodes of a tree behind its prefix, node 0: prompts, then their answers.

    Returns:
        The distinct prompts, and (K,) the node of each answer's prompt.
    """
    numbers: dict[int, int] = {}
    prompts: list[Prompt] = []
    for leaf in leaves:
        if id(leaf.prompt) not in numbers:
            prompts.append(leaf.prompt)
            numbers[id(leaf.prompt)] = len(prompts)
    for number, leaf in enumerate(leaves):
        leaf.node = len(prompts) + 1 + number
    return prompts, [numbers[id(leaf.prompt)] for leaf in leaves]
