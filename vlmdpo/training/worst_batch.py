"""The batches of a prepared dataset that take the most memory, for an estimate of it.

Where rows of one image train together, a batch holds whole groups of them and, at its ends, parts
of groups. Which sizes meet is seen in the orders of some epochs. Each is then taken to be the
longest group of its size, whatever the seed: so an estimate counts what rows share, and no batch of
such sizes has more tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from vlmdpo.data.groups import RowGroups, answer_numbers, row_groups
from vlmdpo.training.image_grouping import ImageGroupedSampler
from vlmdpo.training.sharing import SharedRows

if TYPE_CHECKING:
    from datasets import Dataset

    from vlmdpo.engine.lengths import RowLength

_SEED = 42  # of the orders whose sizes are looked at
_ROWS_LOOKED_AT = 30_000  # at least: small data have few batches an epoch, and every one differs
_TRIED_GROUPS = 32  # of the longest ones, parts of which are compared
_Piece = tuple[int, bool]  # rows of one image in a batch, and whether those are all
_Cost = Callable[[Sequence[int]], tuple[int, ...]]


class WorstBatches:
    """Finds the rows of the largest batches.

    Args:
        dataset: prepared rows.
        lengths: their tokens.
        rows_per_step: pairs of an optimizer step, over all processes.
        grouped: whether rows of one image train together; else no two of a batch need have one.
        share_images: whether different prompts can share their images; not where the model reads
            prompts in both directions.
    """

    def __init__(
        self,
        dataset: Dataset,
        lengths: Sequence[RowLength],
        rows_per_step: int,
        *,
        grouped: bool,
        share_images: bool = True,
    ) -> None:
        self.lengths, self.rows_per_step, self.grouped = lengths, rows_per_step, grouped
        self.groups: RowGroups = row_groups(dataset)
        answers = answer_numbers(dataset, self.groups)
        self._shared = SharedRows(self.groups, answers, lengths, share_images=share_images)
        self._by_image: dict[tuple[int, int], list[int]] = {}
        for row in range(len(lengths)):
            self._by_image.setdefault(self.groups.together(row), []).append(row)

    @property
    def pairs_per_prompt(self) -> float:
        """On average, over the whole dataset."""
        return len(self.lengths) / max(1, self.groups.num_prompts)

    def of_size(self, pairs: int, *, shared: bool) -> list[list[int]]:
        """Rows of the batch with the most tokens, and of the one with the most of images if that is
        another: either may need the most memory. All rows, where there are fewer than `pairs`.

        Args:
            shared: whether the engine computes once what rows share.
        """
        longest_first = sorted(range(len(self.lengths)), key=lambda r: -self.lengths[r].longest)
        if not shared or pairs >= len(longest_first):
            return [longest_first[:pairs]]
        if not (self.grouped and self.groups.is_shared):
            return [self._of_different_images(pairs)]
        by_tokens, by_images = (self._grouped(pairs, cost) for cost in (self._tokens, self._images))
        more_images = self._images(by_images)[0] > self._images(by_tokens)[0]
        return [by_tokens, by_images] if more_images else [by_tokens]

    def _tokens(self, rows: Sequence[int]) -> tuple[int, ...]:
        return (self._shared.run_tokens(rows),)

    def _images(self, rows: Sequence[int]) -> tuple[int, ...]:
        images = {self.groups.images[row]: self.lengths[row].images for row in rows}
        return sum(images.values()), self._shared.run_tokens(rows)

    def _of_different_images(self, pairs: int) -> list[int]:
        """The longest rows, no two of one image as long as there are others."""
        by_length = [
            sorted(rows, key=lambda row: self._tokens([row]), reverse=True)
            for rows in self._by_image.values()
        ]
        ranked = [
            (place, tuple(-n for n in self._tokens([row])), row)
            for rows in by_length
            for place, row in enumerate(rows)
        ]
        return [row for *_, row in sorted(ranked)[:pairs]]

    @cached_property
    def _orders(self) -> list[list[int]]:
        """The rows in the order of each of some epochs."""
        sampler = ImageGroupedSampler(self.groups, self.rows_per_step, _SEED)
        orders = []
        for epoch in range(math.ceil(_ROWS_LOOKED_AT / len(self.lengths))):
            sampler.set_epoch(epoch)
            orders.append(list(sampler))
        return orders

    def _grouped(self, pairs: int, cost: _Cost) -> list[int]:
        """The batch that costs the most of those whose sizes meet."""
        ends = range(pairs, len(self.lengths) + 1, pairs)
        batches = (order[end - pairs : end] for order in self._orders for end in ends)
        real = {self._pieces(batch): batch for batch in batches}
        wanted: Counter[_Piece] = Counter()
        for pieces in real:
            wanted |= Counter(pieces)
        by_cost = sorted(self._by_image.values(), key=cost, reverse=True)
        longest = {piece: self._longest(piece, by_cost, cost, n) for piece, n in wanted.items()}
        filled = (self._filled(pieces, longest) or batch for pieces, batch in real.items())
        return max(filled, key=cost)

    def _pieces(self, batch: Iterable[int]) -> tuple[_Piece, ...]:
        sizes = Counter(map(self.groups.together, batch))
        pieces = ((size, size == len(self._by_image[image])) for image, size in sizes.items())
        return tuple(sorted(pieces, reverse=True))

    def _longest(
        self, piece: _Piece, by_cost: Iterable[list[int]], cost: _Cost, count: int
    ) -> list[list[int]]:
        """Rows for this piece, the longest first.

        Args:
            by_cost: the rows of each image, the longest first.
            count: how many of these pieces a batch has at most.
        """
        size, is_whole = piece
        if is_whole:
            return [rows for rows in by_cost if len(rows) == size]
        larger = [rows for rows in by_cost if len(rows) > size]
        parts = [self._part(rows, size, cost) for rows in larger[: count + _TRIED_GROUPS]]
        return sorted(parts, key=cost, reverse=True) + [
            rows[:size] for rows in larger[len(parts) :]
        ]

    def _part(self, rows: Sequence[int], size: int, cost: _Cost) -> list[int]:
        """`size` of these rows, each one that adds the most."""
        left = list(rows)
        part: list[int] = []
        for _ in range(size):
            part.append(max(left, key=lambda row: cost([*part, row])))
            left.remove(part[-1])
        return part

    def _filled(
        self, pieces: Iterable[_Piece], longest: dict[_Piece, list[list[int]]]
    ) -> list[int] | None:
        """The longest rows for each piece, no image twice; None if there are too few."""
        used: set[tuple[int, int]] = set()
        batch: list[int] = []
        for piece in pieces:
            rows = next(self._unused(longest[piece], used), None)
            if rows is None:
                return None
            used.add(self.groups.together(rows[0]))
            batch += rows
        return batch

    def _unused(
        self, parts: Iterable[list[int]], used: set[tuple[int, int]]
    ) -> Iterator[list[int]]:
        return (rows for rows in parts if self.groups.together(rows[0]) not in used)
