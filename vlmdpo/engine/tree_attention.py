"""Attention over a tree, one run of nodes after the other: its queries against the keys of its
ancestors and itself.

Each run reads a row of its own, of which only the end asks. So where the model's mask is causal,
the run's is causal too, aligned at the lower right, and needs no mask in memory: on a GPU it is
flash attention. Where it is not (a sliding window within reach, images read in both directions),
the mask is the model's own, evaluated at the indices of that row.

Shapes: T slots of the packed row, q and kv slots that ask and are asked, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.utils._python_dispatch import _disable_current_modes

from vlmdpo.engine.causality import is_plainly_causal
from vlmdpo.engine.packed_attention import additive_mask
from vlmdpo.engine.tree import Forest

AttentionFunction = Callable[..., tuple[Tensor, Any]]


@dataclass(frozen=True)
class Run:
    """Nodes that lie one behind the other and continue each other: one attention call.

    Attributes:
        nodes: each is the first child of the one before.
        prompt: a prompt in whose row they stand.
    """

    nodes: tuple[int, ...]
    prompt: int


@dataclass(frozen=True)
class _Block:
    """What one run of nodes asks.

    Attributes:
        queries: its slots.
        sees: the nodes whose keys it is given.
        keys: their slots.
        allowed: (q, kv) bool or a `CausalBias`; None where causal without a mask.
    """

    queries: int
    sees: tuple[int, ...]
    keys: int
    allowed: Tensor | None


class TreeMask(Tensor):
    """In place of the (1, 1, T, T) mask: only those blocks of it that attention looks at.

    A tensor in name only, without storage, because models pass a ready 4-D mask through to their
    attention untouched, and refuse anything that is not a tensor.
    """

    lengths: tuple[int, ...]  # (N,) slots of each node
    blocks: list[_Block]

    @classmethod
    def of(cls, lengths: tuple[int, ...], blocks: list[_Block], device: torch.device) -> TreeMask:
        """A mask of these blocks, for nodes of these lengths."""
        slots = sum(lengths)
        mask: TreeMask = Tensor._make_wrapper_subclass(
            cls, (1, 1, slots, slots), dtype=torch.bool, device=device
        )
        mask.lengths, mask.blocks = lengths, blocks
        return mask

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.alias.default:  # a slice that is all of it: Gemma 4 takes one
            return cls.of(args[0].lengths, args[0].blocks, args[0].device)
        raise TypeError(f"{func} needs the values of a mask, and a TreeMask has none")

    def attend(
        self,
        attention: AttentionFunction,
        additive: bool,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention, one run of nodes after the other.

        Args:
            attention: transformers' attention function, for one block.
            additive: whether it adds masks to scores, as eager attention does.
            query, key, value: (1, heads, T, D).

        Returns:
            (1, T, heads, D), and no weights.
        """
        kwargs.pop("is_causal", None)  # the blocks' masks say it
        # One split each, not many slices: its gradient is one concatenation.
        queries = query.split([block.queries for block in self.blocks], dim=2)
        keys, values = key.split(self.lengths, dim=2), value.split(self.lengths, dim=2)
        outputs = []
        for q, block in zip(queries, self.blocks, strict=True):
            k, v = (
                torch.cat([parts[node] for node in block.sees], dim=2)
                if len(block.sees) > 1
                else parts[block.sees[0]]
                for parts in (keys, values)
            )
            mask = _attention_mask(block, q, k.dtype if additive else None)
            outputs.append(attention(module, q, k, v, mask, **kwargs)[0])
        return torch.cat(outputs, dim=1), None


def tree_mask(
    forest: Forest,
    runs: Sequence[Run],
    sees: Sequence[tuple[int, ...]],
    slot_index: Tensor,
    mask_function: Callable[..., Tensor],
) -> TreeMask:
    """The model's mask function for these runs.

    Args:
        sees: the nodes that each run's slots may see.
        slot_index: (T,) the index of each slot in a row of its own.
    """
    blocks = [
        _block(forest, run, nodes, slot_index, mask_function)
        for run, nodes in zip(runs, sees, strict=True)
    ]
    return TreeMask.of(forest.lengths, blocks, slot_index.device)


def _block(
    forest: Forest,
    run: Run,
    sees: tuple[int, ...],
    slot_index: Tensor,
    mask_function: Callable[..., Tensor],
) -> _Block:
    queries = sum(forest.lengths[node] for node in run.nodes)
    keys = sum(forest.lengths[node] for node in sees)
    if sees == forest.path(run.nodes[-1]) and is_plainly_causal(mask_function, keys):
        # One token sees all before it, and a square mask is attention's own.
        allowed = None if queries in (1, keys) else _causal(queries, keys, slot_index.device)
        return _Block(queries, sees, keys, allowed)
    parts = slot_index.split(forest.lengths)
    query_index = torch.cat([parts[node] for node in run.nodes])
    key_index = torch.cat([parts[node] for node in sees])
    # Filled on the device, and of the indices' dimensions: a number would be copied there, or
    # read from there when a mask function indexes with it.
    row = torch.full((1, 1), run.prompt, device=slot_index.device)
    allowed = mask_function(row, torch.zeros_like(row), query_index[:, None], key_index[None, :])
    return _Block(queries, sees, keys, allowed.expand(queries, keys))


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """A causal mask whose last query sees all keys: on a GPU only its name, for flash attention.

    Made for each forward pass, it serves all layers.
    """
    if device.type == "cpu":
        return _lower_right(queries, keys, device)
    # A dispatch mode, as those that count operations, would make another tensor in its place.
    with _disable_current_modes():
        return causal_lower_right(queries, keys)


def _lower_right(queries: int, keys: int, device: torch.device) -> Tensor:
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return ones.tril(keys - queries)


def _attention_mask(block: _Block, query: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """The mask of a block for an attention function; None where it is causal anyway.

    Args:
        dtype: of an additive mask (1, 1, q, kv), as eager attention wants it; else bool.
    """
    allowed = block.allowed
    if dtype is not None:
        if allowed is None or isinstance(allowed, CausalBias):
            allowed = _lower_right(block.queries, block.keys, query.device)
        return additive_mask(allowed, dtype)[None, None]
    return allowed if allowed is None or isinstance(allowed, CausalBias) else allowed[None, None]
