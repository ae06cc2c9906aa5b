"""Packed preference pairs, and attention over them: image, prompt and chosen answer, then the
rejected one against the prompt.

One batch is one row of slots, without padding. Each pair lies in it as

    [ prompt but its last token | last, chosen ... | last, rejected ... ]

and every slot knows which index it would have in the row that stock TRL makes of prompt and answer.
That map is all: positions are gathered by it, and the model's own mask function is evaluated at it,
so sliding windows and bidirectional images keep their meaning. This module knows nothing of images,
losses or trainers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmdpo.engine.packed_attention import additive_mask


@dataclass(frozen=True)
class Span:
    """Where one pair lies, in slots: `prefix` (prompt but its last token), then the two branches
    (last token, answer).
    """

    start: int
    prefix: int
    chosen: int
    rejected: int

    @property
    def chosen_row(self) -> int:
        """Slots of prompt and chosen answer, which lie together as a row of their own would."""
        return self.prefix + self.chosen

    @property
    def length(self) -> int:
        return self.prefix + self.chosen + self.rejected


class PairLayout:
    """The index maps of one packed batch of B pairs with T slots; S is the longest row stock would
    have.

    Args:
        lengths: for each pair the tokens of prompt, chosen and rejected answer.
        device: where the maps are needed.

    Attributes:
        slot_pair, slot_index: (T,) the pair of a slot, and its index in the stock row of prompt and
        answer. row_slot, row_mask: (B, S) the slot of each index, following the longer answer, and
        whether there is one.
        hidden_slot: (2B, 1 + C) the slot of each branch token, chosen rows first, as TRL's loss
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
            first, second = span.start + span.prefix, span.start + span.prefix + span.chosen
            chosen_slots.append(torch.arange(first, second))
            rejected_slots.append(torch.arange(second, second + span.rejected))
            longer = max(chosen_slots[-1], rejected_slots[-1], key=len)
            rows.append(torch.cat([torch.arange(span.start, first), longer]))
            branch = [
                torch.arange(span.prefix, span.prefix + n) for n in (span.chosen, span.rejected)
            ]
            indices.append(torch.cat([torch.arange(span.prefix), *branch]))
            pairs.append(torch.full((span.length,), number))
        self.slot_pair = torch.cat(pairs).to(device)
        self.slot_index = torch.cat(indices).to(device)
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        self.hidden_slot = pad(chosen_slots + rejected_slots).to(device)
        self.row_slot = pad(rows).to(device)
        self.row_mask = pad([torch.ones_like(row) for row in rows]).to(device)

    def to_rows(self, packed: Tensor) -> Tensor:
        """(1, T) values of the slots → (B, S) as stock rows would hold them, zero where a row has
        ended.
        """
        return packed[0][self.row_slot] * self.row_mask

    def from_rows(self, rows: Tensor) -> Tensor:
        """(..., B, S) values of stock rows → (..., 1, T) values of the slots."""
        return rows[..., self.slot_pair, self.slot_index].unsqueeze(-2)

    def seen_by_rejected(self, span: Span, device: torch.device) -> Tensor:
        """(pair slots,) bool: a rejected answer sees the prefix and itself. A chosen one ends
        before it begins.
        """
        slots = torch.arange(span.length, device=device)
        return (slots < span.prefix) | (slots >= span.chosen_row)

    def mask(self, allowed: Callable[..., Tensor], device: torch.device) -> PairMask:
        """What attention is given of the model's own mask function: see `models.packing.Layout`."""
        return PairMask(self, allowed, device)


@dataclass(frozen=True)
class _Block:
    """The masks of one pair, bool (q, kv): prompt and chosen answer (None: plainly causal),
    rejected answer over all.
    """

    chosen_row: Tensor | None
    rejected: Tensor


class PairMask(Tensor):
    """What stands in for the (1, 1, T, T) mask while pairs are packed: the blocks of it that are
    looked at.

    A tensor in name only, without storage: models hand a ready 4-D mask through to their attention
    untouched.
    """

    @staticmethod
    def __new__(
        cls, layout: PairLayout, mask_function: Callable[..., Tensor], device: torch.device
    ) -> PairMask:
        slots = len(layout.slot_pair)
        made: PairMask = Tensor._make_wrapper_subclass(
            cls, (1, 1, slots, slots), dtype=torch.bool, device=device
        )
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, *others: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} needs the numbers of a mask, and a PairMask holds none")

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
        layout: PairLayout, number: int, allowed: Callable[..., Tensor], device: torch.device
    ) -> _Block:
        span = layout.spans[number]
        index = layout.slot_index[span.start : span.start + span.length]
        at = partial(allowed, torch.tensor(number, device=device), torch.tensor(0, device=device))
        row, other = index[: span.chosen_row], index[span.chosen_row :]
        chosen_row = at(row[:, None], row[None, :]).expand(len(row), len(row))
        plain = bool((chosen_row == (row[None, :] <= row[:, None])).all())
        rejected = at(other[:, None], index[None, :]) & layout.seen_by_rejected(span, device)
        return _Block(None if plain else chosen_row, rejected)

    def attend(
        self,
        plain: Callable[..., Any],
        additive: bool,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """(1, heads, T, d) in, (1, T, heads, d) out, one pair after the other. `additive`: masks
        are added to scores.
        """
        kwargs.pop("is_causal", None)
        # One split each, not many slices: its gradient is one concatenation.
        queries = query.split(
            [n for span in self.spans for n in (span.chosen_row, span.rejected)], dim=2
        )
        keys, values = (
            whole.split([span.length for span in self.spans], dim=2) for whole in (key, value)
        )
        outputs = []
        for number, (span, block) in enumerate(zip(self.spans, self.blocks, strict=True)):
            k, v = keys[number], values[number]
            seen, allowed = span.chosen_row, block.chosen_row
            if additive and allowed is None:
                allowed = torch.ones(seen, seen, dtype=torch.bool, device=k.device).tril()
            part = _as_mask(allowed, k.dtype if additive else None)
            outputs.append(
                plain(module, queries[2 * number], k[:, :, :seen], v[:, :, :seen], part, **kwargs)[
                    0
                ]
            )
            part = _as_mask(block.rejected, k.dtype if additive else None)
            outputs.append(plain(module, queries[2 * number + 1], k, v, part, **kwargs)[0])
        return torch.cat(outputs, dim=1), None


def _as_mask(allowed: Tensor | None, additive: torch.dtype | None) -> Tensor | None:
    """(1, 1, q, kv): bool, or with `additive` as eager attention wants it."""
    if allowed is None:
        return None
    return (allowed if additive is None else additive_mask(allowed, additive))[None, None]
