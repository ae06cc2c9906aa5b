"""The order in which rows are visited when rows of one image, and of one prompt, meet in a batch.

A step is what the optimizer sees at once: `batch_size` rows over all processes and forward passes.
The order depends on seed, epoch and that number alone, so however a step is divided, it has the
same rows. Within a step, groups are laid so that they end where its halves, quarters and so on do,
the larger ones first: so few as possible are divided between two forward passes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils.data import Sampler

from vlmdpo.data.groups import RowGroups

_T = TypeVar("_T")
_MEGA_BATCH_STEPS = 50  # sorted by length together, as in transformers
_LOOK_AHEAD = 64  # groups, at least, among which a step's are looked for


@dataclass(frozen=True)
class _Group:
    """Rows of one image that stay together, by prompt."""

    prompts: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> list[int]:
        return [row for prompt in self.prompts for row in prompt]

    @property
    def size(self) -> int:
        return sum(map(len, self.prompts))

    def cut(self, size: int) -> tuple[_Group, _Group]:
        """A part of `size` rows, of whole prompts if there are such, and the others."""
        taken = _earliest([len(prompt) for prompt in self.prompts], size)
        part = [self.prompts[at] for at in taken]
        rest = [prompt for at, prompt in enumerate(self.prompts) if at not in taken]
        missing = size - sum(map(len, part))
        if missing:
            part.append(rest[0][:missing])
            rest[0] = rest[0][missing:]
        return _Group(tuple(part)), _Group(tuple(rest))

    def has_whole_prompts(self, size: int) -> bool:
        """Whether some of its prompts have `size` rows together."""
        lengths = [len(prompt) for prompt in self.prompts]
        return sum(lengths[at] for at in _earliest(lengths, size)) == size


class ImageGroupedSampler(Sampler[int]):
    """Each row once an epoch, rows of one image together; otherwise at random.

    Which groups meet in a step, and the order within a group, change with every epoch. A group is
    divided between two steps only if it is larger than a step, or if no choice among the next
    groups fills the step.

    Args:
        groups: what rows share.
        batch_size: rows of an optimizer step over all processes.
        seed: of the run.
        lengths: tokens of each row, to put groups of similar length together too.
    """

    def __init__(
        self,
        groups: RowGroups,
        batch_size: int,
        seed: int,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.batch_size, self.seed, self.lengths = batch_size, seed, lengths
        self.epoch = 0
        self._rows = len(groups.images)
        by_image: dict[tuple[int, int], dict[int, list[int]]] = {}
        for row, prompt in enumerate(groups.prompts):
            by_image.setdefault(groups.together(row), {}).setdefault(prompt, []).append(row)
        self._images = [list(prompts.values()) for prompts in by_image.values()]

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        groups = self._shuffled_groups(generator)
        if self.lengths is not None:
            groups = self._sorted_by_length(groups, self.lengths)
        for step in _steps(groups, self.batch_size):
            largest_first = sorted(step, key=lambda group: -group.size)
            # The largest power of two by which steps can be divided.
            for group in _aligned(largest_first, self.batch_size & -self.batch_size):
                yield from group.rows

    def _shuffled_groups(self, generator: torch.Generator) -> list[_Group]:
        """All groups in a random order, none larger than a step."""
        groups = []
        for image in self._images:
            prompts = [_shuffled(prompt, generator) for prompt in _shuffled(image, generator)]
            groups += _cut_to_fit(prompts, self.batch_size)
        return _shuffled(groups, generator)

    def _sorted_by_length(self, groups: list[_Group], lengths: Sequence[int]) -> list[_Group]:
        """Groups sorted by their longest row among those of some fifty steps; the longest of all
        comes first, where running out of memory costs least.
        """
        longest = {id(group): max(lengths[row] for row in group.rows) for group in groups}
        steps = max(1, min(_MEGA_BATCH_STEPS, self._rows // (4 * self.batch_size)))
        batches: list[list[_Group]] = [[]]
        rows = 0
        for group in groups:
            if rows >= steps * self.batch_size:
                batches.append([])
                rows = 0
            batches[-1].append(group)
            rows += group.size
        ordered = [
            group
            for batch in batches
            for group in sorted(batch, key=lambda group: -longest[id(group)])
        ]
        at = max(range(len(ordered)), key=lambda at: longest[id(ordered[at])])
        ordered[0], ordered[at] = ordered[at], ordered[0]
        return ordered


def _shuffled(values: Sequence[_T], generator: torch.Generator) -> list[_T]:
    return [values[at] for at in torch.randperm(len(values), generator=generator).tolist()]


def _cut_to_fit(prompts: Iterable[list[int]], limit: int) -> list[_Group]:
    """Rows of one image as groups of at most `limit` rows, divided within a prompt only if it is
    larger than that.
    """
    parts = [
        prompt[start : start + limit]
        for prompt in prompts
        for start in range(0, len(prompt), limit)
    ]
    groups: list[list[tuple[int, ...]]] = []
    room = 0
    for part in parts:
        if len(part) > room:
            groups.append([])
            room = limit
        groups[-1].append(tuple(part))
        room -= len(part)
    return [_Group(tuple(group)) for group in groups]


def _steps(groups: Sequence[_Group], batch_size: int) -> Iterator[list[_Group]]:
    """Groups as steps of exactly `batch_size` rows, but the last.

    Each step begins with the next group and is filled from those that follow, the earliest first,
    within two steps' worth of groups or a few more.
    """
    coming, look_ahead = iter(groups), max(_LOOK_AHEAD, 2 * batch_size)
    window: list[_Group] = []
    while True:
        window += itertools.islice(coming, max(0, look_ahead - len(window)))
        if not window:
            return
        chosen = _fill(window, batch_size)
        step = [window[at] for at in chosen]
        window = _without(window, chosen)
        room = batch_size - sum(group.size for group in step)
        if room and window:
            at = next((i for i, group in enumerate(window) if group.has_whole_prompts(room)), 0)
            first, rest = window.pop(at).cut(room)
            step.append(first)
            window.insert(0, rest)
        yield step


def _without(groups: Sequence[_Group], chosen: Sequence[int]) -> list[_Group]:
    numbers = set(chosen)
    return [group for at, group in enumerate(groups) if at not in numbers]


def _fill(window: Sequence[_Group], batch_size: int) -> list[int]:
    """Which groups make a step as full as can be: the first, and the earliest that allow it."""
    sizes = [group.size for group in window]
    return [0, *(1 + at for at in _earliest(sizes[1:], batch_size - sizes[0]))]


def _earliest(sizes: Sequence[int], room: int) -> list[int]:
    """Which of `sizes` fill `room` as far as any of them can, the earliest that allow it."""
    # Bit n of reachable[i]: some of the sizes from i on are n together.
    within = (1 << (room + 1)) - 1
    reachable = [1] * (len(sizes) + 1)
    for at in range(len(sizes) - 1, -1, -1):
        reachable[at] = (reachable[at + 1] | reachable[at + 1] << sizes[at]) & within
    wanted = reachable[0].bit_length() - 1
    chosen = []
    for at, size in enumerate(sizes):
        if size <= wanted and reachable[at + 1] >> (wanted - size) & 1:
            chosen.append(at)
            wanted -= size
    return chosen


def _aligned(groups: Sequence[_Group], block: int) -> list[_Group]:
    """Groups, given largest first, such that every `block` rows end with a group, and every half of
    them, down to single rows; those that cannot be ordered so come last, as they were.
    """
    if block == 1 or len(groups) == 1:
        return list(groups)
    arranged: list[_Group] = []
    left = list(groups)
    while left and left[0].size <= block:
        chosen = _fill(left, block)
        if sum(left[at].size for at in chosen) < block:
            break
        arranged += _aligned([left[at] for at in chosen], block // 2)
        left = _without(left, chosen)
    return arranged + left
