"""Packed preference pairs, and attention over them: image, prompt and chosen answer, then the
rejected answer against the prompt.

One batch is one row of slots, without padding. Each pair lies in it as

    [ prompt but its last token | last, chosen ... | last, rejected ... ]
      prefix                      chosen branch      rejected branch

and every slot knows which index it would have in the row that stock TRL makes of prompt and answer.
That map is all: positions are gathered by it, and the model's own mask function is evaluated at it,
so sliding windows and bidirectional images keep their meaning. This module knows nothing of images,
losses or trainers.

Shapes: B pairs, T slots of the packed row, S length of the longest stock row, C tokens of the
longest answer, q and kv slots that ask and are asked, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmdpo.engine.causality import is_plainly_causal
from vlmdpo.engine.devices import to_device
from vlmdpo.engine.packed_attention import additive_mask

AttentionFunction = Callable[..., tuple[Tensor, Any]]


@dataclass(frozen=True)
class Span:
    """Where one pair lies: its first slot, and the slots of its three parts.

    Attributes:
        start: first slot.
        prefix: slots of the prompt but its last token.
        chosen, rejected: slots of each branch, the prompt's last token and the answer.
    """

    start: int
    prefix: int
    chosen: int
    rejected: int

    @property
    def chosen_row(self) -> int:
        """Slots of prompt and chosen answer, which lie together as in a row of their own."""
        return self.prefix + self.chosen

    @property
    def length(self) -> int:
        return self.prefix + self.chosen + self.rejected


class PairLayout:
    """The index maps of one packed batch. A `packed_attention.Layout`.

    Args:
        lengths: for each pair the tokens of prompt, chosen and rejected answer.
        device: where the maps are needed.

    Attributes:
        slot_pair, slot_index: (T,) the pair of each slot, and its index in the stock row of prompt
            and answer.
        row_slots, row_mask: (B, S) the slot of each index of a stock row, along the longer answer,
            and 1 where there is one.
        branch_slots: (2B, 1 + C) the slot of each branch token, chosen rows first, as TRL's loss
            wants them.
    """

    def __init__(self, lengths: Sequence[Sequence[int]], device: torch.device) -> None:
        self.spans: list[Span] = []
        start = 0
        for prompt, chosen, rejected in lengths:
            self.spans.append(Span(start, prompt - 1, 1 + chosen, 1 + rejected))
            start += self.spans[-1].length
        pairs, indices, chosen_slots, rejected_slots, rows = [], [], [], [], []
        for number, span in enumerate(self.spans):
            chosen_start = span.start + span.prefix
            rejected_start = chosen_start + span.chosen
            chosen_slots.append(torch.arange(chosen_start, rejected_start))
            rejected_slots.append(torch.arange(rejected_start, rejected_start + span.rejected))
            longer = max(chosen_slots[-1], rejected_slots[-1], key=len)
            rows.append(torch.cat([torch.arange(span.start, chosen_start), longer]))
            branches = [
                torch.arange(span.prefix, span.prefix + length)
                for length in (span.chosen, span.rejected)
            ]
            indices.append(torch.cat([torch.arange(span.prefix), *branches]))
            pairs.append(torch.full((span.length,), number))
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        maps = [torch.cat(pairs), torch.cat(indices), pad(chosen_slots + rejected_slots)]
        maps += [pad(rows), pad([torch.ones_like(row) for row in rows])]
        # One copy to the device for all of them.
        moved = to_device(torch.cat([each.flatten() for each in maps]), device)
        parts = moved.split([each.numel() for each in maps])
        self.slot_pair, self.slot_index, self.branch_slots, self.row_slots, self.row_mask = (
            part.view_as(each) for part, each in zip(parts, maps, strict=True)
        )

    def slots_to_rows(self, values_1T: Tensor) -> Tensor:
        """(1, T, ...) values of slots → (B, S, ...) as in stock rows, zero behind a row's end."""
        values_BS = values_1T[0][self.row_slots]
        return values_BS * self.row_mask.view(*self.row_mask.shape, *[1] * (values_BS.ndim - 2))

    def rows_to_slots(self, values_BS: Tensor) -> Tensor:
        """(..., B, S) values of stock rows → (..., 1, T) values of the slots."""
        return values_BS[..., self.slot_pair, self.slot_index].unsqueeze(-2)

    def visible_to_rejected(self, span: Span, device: torch.device) -> Tensor:
        """(span.length,) bool: the slots that a rejected answer may see, the prefix and itself.

        A chosen answer ends before the rejected one begins, so causality is enough for it.
        """
        slots = torch.arange(span.length, device=device)
        return (slots < span.prefix) | (slots >= span.chosen_row)

    def mask(self, mask_function: Callable[..., Tensor], device: torch.device) -> PairMask:
        """The model's own mask function at this layout; see `packed_attention.Layout`."""
        return PairMask(self, mask_function, device)


@dataclass(frozen=True)
class _Block:
    """The masks of one pair, bool (q, kv).

    Attributes:
        chosen_row: prompt and chosen answer among themselves; None where plainly causal.
        rejected: the rejected answer over the whole pair.
    """

    chosen_row: Tensor | None
    rejected: Tensor


class PairMask(Tensor):
    """In place of the (1, 1, T, T) mask: only those blocks of it that attention looks at.

    A tensor in name only, without storage, because models pass a ready 4-D mask through to their
    attention untouched, and refuse anything that is not a tensor.
    """

    @staticmethod
    def __new__(
        cls, layout: PairLayout, mask_function: Callable[..., Tensor], device: torch.device
    ) -> PairMask:
        return cls._without_blocks(len(layout.slot_pair), device)

    @classmethod
    def _without_blocks(cls, slots: int, device: torch.device) -> PairMask:
        mask: PairMask = Tensor._make_wrapper_subclass(
            cls, (1, 1, slots, slots), dtype=torch.bool, device=device
        )
        return mask

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.alias.default:  # a slice that is all of it: Gemma 4 takes one
            mask, same = args[0], cls._without_blocks(args[0].shape[-1], args[0].device)
            same.spans, same.blocks = mask.spans, mask.blocks
            return same
        raise TypeError(f"{func} needs the values of a mask, and a PairMask has none")

    def __init__(
        self, layout: PairLayout, mask_function: Callable[..., Tensor], device: torch.device
    ) -> None:
        self.spans = layout.spans
        self.blocks = [
            self._block(layout, number, mask_function, device)
            for number in range(len(layout.spans))
        ]

    @staticmethod
    def _block(
        layout: PairLayout,
        number: int,
        mask_function: Callable[..., Tensor],
        device: torch.device,
    ) -> _Block:
        span = layout.spans[number]
        index = layout.slot_index[span.start : span.start + span.length]
        # Filled on the device, and of the indices' dimensions: a number would be copied there, or
        # read from there when a mask function indexes with it.
        batch = torch.full((1, 1), number, device=device)
        allowed = partial(mask_function, batch, torch.zeros_like(batch))
        row, other = index[: span.chosen_row], index[span.chosen_row :]
        chosen_row = None
        if not is_plainly_causal(mask_function, len(row)):
            chosen_row = allowed(row[:, None], row[None, :]).expand(len(row), len(row))
        visible = layout.visible_to_rejected(span, device)
        rejected = allowed(other[:, None], index[None, :]) & visible
        return _Block(chosen_row, rejected)

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
        """Attention, one pair after the other.

        Args:
            attention: transformers' attention function, for one block.
            additive: whether it adds masks to scores, as eager attention does.
            query, key, value: (1, heads, T, D).

        Returns:
            (1, T, heads, D), and no weights.
        """
        kwargs.pop("is_causal", None)  # the blocks' masks say it
        # One split each, not many slices: its gradient is one concatenation.
        queries = query.split(
            [n for span in self.spans for n in (span.chosen_row, span.rejected)], dim=2
        )
        lengths = [span.length for span in self.spans]
        keys, values = key.split(lengths, dim=2), value.split(lengths, dim=2)
        outputs = []
        for number, (span, block) in enumerate(zip(self.spans, self.blocks, strict=True)):
            k, v = keys[number], values[number]
            dtype = k.dtype if additive else None
            seen, chosen_row = span.chosen_row, block.chosen_row
            if additive and chosen_row is None:
                chosen_row = torch.ones(seen, seen, dtype=torch.bool, device=k.device).tril()
            for q, k_seen, v_seen, allowed in (
                (queries[2 * number], k[:, :, :seen], v[:, :, :seen], chosen_row),
                (queries[2 * number + 1], k, v, block.rejected),
            ):
                mask = _attention_mask(allowed, dtype)
                outputs.append(attention(module, q, k_seen, v_seen, mask, **kwargs)[0])
        return torch.cat(outputs, dim=1), None


def _attention_mask(allowed: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """(q, kv) bool → (1, 1, q, kv): bool, or additive in `dtype`, as eager attention wants it."""
    if allowed is None:
        return None
    return (allowed if dtype is None else additive_mask(allowed, dtype))[None, None]
