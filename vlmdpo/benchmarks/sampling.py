"""A part of a benchmark that stands for the whole: drawn at random, in the whole's proportions."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

SEED = 0

T = TypeVar("T")


def stratified(items: Sequence[T], limit: int | None, stratum: Callable[[T], Hashable]) -> list[T]:
    """`limit` items in their order, from every stratum its share of the whole to within one item.

    A smaller part lies within a larger one, so answers to it count for that too. All items if
    `limit` is None or at least their number.
    """
    if limit is None or limit >= len(items):
        return list(items)
    rng = random.Random(SEED)
    members: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        members.setdefault(stratum(item), []).append(index)
    size = {key: len(indices) for key, indices in members.items()}
    for indices in members.values():
        rng.shuffle(indices)
    taken: list[int] = []
    for drawn in range(1, limit + 1):  # next comes the stratum that lacks most of its share
        key = max(
            (key for key in members if members[key]),
            key=lambda key: drawn * size[key] / len(items) - (size[key] - len(members[key])),
        )
        taken.append(members[key].pop())
    return [items[index] for index in sorted(taken)]
