"""Texts that share their beginnings, as one packed row: a tree of an image, its questions and their
answers.

    image + common words ─┬─ question 1 ─┬─ answer
                          │              └─ answer
                          └─ question 2 ─── answer

Nodes lie one after the other in a row of slots, depth first and without padding. Each slot knows
the index it would have in a row of its own: that of its node's ancestors and itself. Positions are
gathered by that index, and the model's own mask function is evaluated at it, so that sliding
windows and bidirectional images keep their meaning; to that comes "a node sees its ancestors and
itself". Training reads log-probs off the leaves (`tree_layout`), asking lets them grow
(`GrowingTree`). This module knows nothing of images, losses or models.

Shapes: N nodes, P distinct prompts, D distinct answers, q and kv slots that ask and are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from vlmdpo.engine.devices import to_device

ROOT = -1  # the parent of a node that has none


@dataclass(frozen=True)
class Forest:
    """The trees of one batch, on the host. Nodes are in depth-first order.

    Attributes:
        parents: (N,) the parent of each node; ROOT for a root.
        lengths: (N,) tokens of each node, at least one.
        prompts: (P,) the node in which each distinct prompt ends.
        answers: (D,) the node of each distinct answer.
        images: how many images each tree has.
        stock_tokens: tokens of the rows that stock TRL would make of it.
    """

    parents: tuple[int, ...]
    lengths: tuple[int, ...]
    prompts: tuple[int, ...]
    answers: tuple[int, ...]
    images: tuple[int, ...] = ()
    stock_tokens: int = 0

    @property
    def slots(self) -> int:
        """Tokens of the packed row."""
        return sum(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """(N,) the first slot of each node."""
        return tuple(accumulate(self.lengths, initial=0))[:-1]

    @property
    def roots(self) -> list[int]:
        return [node for node, parent in enumerate(self.parents) if parent == ROOT]

    @property
    def tree_lengths(self) -> list[int]:
        """Slots of each tree."""
        bounds = [*(self.starts[root] for root in self.roots), self.slots]
        return [end - start for start, end in pairwise(bounds)]

    def path(self, node: int) -> tuple[int, ...]:
        """The nodes from the root to this one, which a row of its own would hold."""
        parent = self.parents[node]
        return (node,) if parent == ROOT else (*self.path(parent), node)

    def tokens(self, node: int) -> int:
        """Tokens from the root to the end of this node."""
        return sum(self.lengths[each] for each in self.path(node))

    def answers_of(self, prompt: int) -> list[int]:
        """The nodes of a prompt's answers."""
        return [node for node in self.answers if self.parents[node] == self.prompts[prompt]]

    def prompt_of(self, answer: int) -> int:
        """The number of the prompt that an answer's node belongs to."""
        return self.prompts.index(self.parents[answer])


class GrowingTree:
    """Nodes that get slots step by step, while texts are generated. A `packed_attention.Layout`.

    Args:
        prefix: slots of node 0, whose keys and values are cached.
        parents: the parent of each node after node 0.
        device: where masks are needed.
    """

    def __init__(self, prefix: int, parents: Sequence[int], device: torch.device) -> None:
        self.slot_node = torch.zeros(prefix, dtype=torch.long, device=device)
        self.slot_index = torch.arange(prefix, device=device)
        self._sees_NN = to_device(ancestry([ROOT, *parents]), device)
        self._new = 0

    def __len__(self) -> int:
        return len(self.slot_node)

    def extend(self, nodes: Tensor, index: Tensor) -> None:
        """Add slots, which the next mask is for.

        Args:
            nodes: (q,) the node of each new slot.
            index: (q,) its index in the row that its node would have alone.
        """
        self.slot_node = torch.cat([self.slot_node, nodes])
        self.slot_index = torch.cat([self.slot_index, index])
        self._new = len(nodes)

    def mask(self, mask_function: Callable[..., Tensor], device: torch.device) -> Tensor:
        """(1, 1, q, kv) bool: the model's own mask function, of the new slots over all of them."""
        # Batch and head, of the indices' dimensions: a mask function that indexes with a number
        # would read it from the device.
        zero = torch.zeros((1, 1), dtype=torch.long, device=device)
        nodes, index = self.slot_node[-self._new :], self.slot_index[-self._new :]
        allowed = mask_function(zero, zero, index[:, None], self.slot_index[None, :])
        return (allowed & self._sees_NN[nodes[:, None], self.slot_node[None, :]])[None, None]


def ancestry(parents: Sequence[int]) -> Tensor:
    """(N, N) bool: whether a node (row) sees another (column), its ancestor or itself."""
    sees = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent != ROOT:
            sees[node] |= sees[parent]
    return sees


def common_beginning(texts: Sequence[Sequence[object]]) -> int:
    """How many tokens all texts begin with, leaving each at least one of its own.

    Args:
        texts: for each its tokens, of any kind that can be compared.
    """
    length = 0
    for column in zip(*texts, strict=False):
        if any(token != column[0] for token in column):
            break
        length += 1
    return min(length, min(map(len, texts)) - 1)
