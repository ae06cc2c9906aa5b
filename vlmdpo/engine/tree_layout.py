"""The slots of a batch's trees: positions, rows and masks by one index map.

Shapes: T slots, N nodes, P distinct prompts, S length of the longest stock row, D distinct answers,
C tokens of the longest answer; positions may have a leading dimension more (M-RoPE), written "...".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from vlmdpo.engine.devices import to_device
from vlmdpo.engine.tree import Forest
from vlmdpo.engine.tree_attention import Run, TreeMask, tree_mask


class TreeLayout:
    """The index maps of one packed batch. A `packed_attention.Layout`.

    Args:
        forest: what the batch holds.
        device: where the maps are needed.

    Attributes:
        slot_row, slot_index: (T,) the row of each slot, and its index in it. A row is that of a
            prompt and its longest answer.
        row_slots, row_mask: (P, S) the slot of each index of a row, and 1 where there is one.
        answer_slots: (D, 1 + C) the slots of the prompt's last token and of the answer.
        runs: what attention is computed by, in the order of the slots.
    """

    def __init__(self, forest: Forest, device: torch.device) -> None:
        self.forest = forest
        self.row_of_node = _rows_of_nodes(forest)
        self.runs = self._make_runs()
        slots = [
            torch.arange(start, start + length)
            for start, length in zip(forest.starts, forest.lengths, strict=True)
        ]
        index = [
            torch.arange(end - length, end)
            for end, length in zip(
                map(forest.tokens, range(len(slots))), forest.lengths, strict=True
            )
        ]
        rows = []
        for prompt, end in enumerate(forest.prompts):
            longest = max(forest.answers_of(prompt), key=forest.lengths.__getitem__, default=end)
            rows.append(torch.cat([slots[node] for node in forest.path(longest)]))
        answers = [
            torch.cat([slots[forest.parents[node]][-1:], slots[node]]) for node in forest.answers
        ]
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        maps = [
            torch.repeat_interleave(torch.tensor(self.row_of_node), torch.tensor(forest.lengths)),
            torch.cat(index),
            pad(answers),
            pad(rows),
            pad([torch.ones_like(row) for row in rows]),
        ]
        # One copy to the device for all of them.
        moved = to_device(torch.cat([each.flatten() for each in maps]), device)
        parts = moved.split([each.numel() for each in maps])
        self.slot_row, self.slot_index, self.answer_slots, self.row_slots, self.row_mask = (
            part.view_as(each) for part, each in zip(parts, maps, strict=True)
        )

    def _make_runs(self) -> list[Run]:
        runs: list[list[int]] = []
        for node, parent in enumerate(self.forest.parents):
            if parent == node - 1 and node:
                runs[-1].append(node)
            else:
                runs.append([node])
        return [Run(tuple(nodes), self.row_of_node[nodes[-1]]) for nodes in runs]

    def sees(self, run: Run) -> tuple[int, ...]:
        """The nodes that a run's slots may see, in the order of their slots."""
        return self.forest.path(run.nodes[-1])

    def image_rows(self) -> list[int]:
        """For each row of `row_slots` its images, numbered over the batch, one behind the other."""
        roots = self.forest.roots
        firsts = list(accumulate(self.forest.images, initial=0))
        trees = [roots.index(self.forest.path(end)[0]) for end in self.forest.prompts]
        return [image for tree in trees for image in range(firsts[tree], firsts[tree + 1])]

    def slots_to_rows(self, values_1T: Tensor) -> Tensor:
        """(1, T, ...) values of slots → (P, S, ...) as in stock rows, zero behind a row's end."""
        values_PS = values_1T[0][self.row_slots]
        return values_PS * self.row_mask.view(*self.row_mask.shape, *[1] * (values_PS.ndim - 2))

    def rows_to_slots(self, values_PS: Tensor) -> Tensor:
        """(..., P, S) values of stock rows → (..., 1, T) values of the slots."""
        return values_PS[..., self.slot_row, self.slot_index].unsqueeze(-2)

    def mask(self, mask_function: Callable[..., Tensor], device: torch.device) -> TreeMask:
        """The model's own mask function at this layout; see `packed_attention.Layout`."""
        sees = [self.sees(run) for run in self.runs]
        return tree_mask(self.forest, self.runs, sees, self.slot_index, mask_function)


def _rows_of_nodes(forest: Forest) -> list[int]:
    """(N,) a row that each node stands in: that of the first prompt at or below it, or above it."""
    rows = [-1] * len(forest.parents)
    for prompt, end in enumerate(forest.prompts):
        for node in forest.path(end):
            rows[node] = prompt if rows[node] < 0 else rows[node]
    for node, parent in enumerate(forest.parents):
        rows[node] = rows[parent] if rows[node] < 0 else rows[node]
    return rows
