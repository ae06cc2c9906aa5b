"""Rows to check an engine with: some that share what the data's rows share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmdpo.data.groups import row_groups

if TYPE_CHECKING:
    from datasets import Dataset

_RELATED_POOL = 512


def related_rows(dataset: Dataset, count: int) -> list[int]:
    """Up to `count` of the first rows about one image: of one prompt, and of others."""
    pool = range(min(len(dataset), _RELATED_POOL))
    groups = row_groups(dataset.select(pool))
    by_image: dict[tuple[int, int], list[int]] = {}
    for row in pool:
        by_image.setdefault(groups.together(row), []).append(row)

    def chosen(rows: list[int]) -> list[int]:
        prompts = [groups.prompts[row] for row in rows]
        largest = max(prompts, key=prompts.count)
        of_one = [row for row in rows if groups.prompts[row] == largest]
        others = [row for row in rows if groups.prompts[row] != largest]
        first = of_one[: max(1, count - len(others[: count // 2]))]
        return first + others[: count - len(first)]

    def kinds(rows: list[int]) -> tuple[int, int]:
        prompts = len({groups.prompts[row] for row in rows})
        return (prompts > 1) + (prompts < len(rows)), len(rows)

    return max(map(chosen, by_image.values()), key=kinds, default=[])
