"""Assemble checked units into the prepared dataset: drop duplicates, split by image, shuffle.

If a unit's rows stay together, its shard becomes a shard of the dataset by a hard link.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmdpo.data import store
from vlmdpo.data.work import RowCounts, record_path, shard_path
from vlmdpo.errors import DataError


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """How rows are split and ordered.

    Attributes:
        test_size: a share of the rows if below 1, else a number; 0 for no test split. No image is
            in both splits.
        shuffle: whether to shuffle the rows.
        seed: of both.
    """

    test_size: float
    shuffle: bool
    seed: int


@dataclass
class Plan:
    """The rows of each split, as (unit, index), in order, and what happened to all rows."""

    row_counts: RowCounts
    splits: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    unit_rows: list[int] = field(default_factory=list)
    sides: Counter[int] = field(default_factory=Counter)  # images by longer side, in pixels


def plan(work: Path, units: int, settings: SplitSettings, on_bad: str) -> Plan:
    """Decide from the units' records which rows are kept, and in which split.

    Raises:
        DataError: no row is left, an empty split, or a duplicate if `on_bad` is "fail".
    """
    result = Plan(RowCounts())
    rows: list[tuple[int, int]] = []
    images_of_rows: list[tuple[str, ...]] = []
    seen: dict[int, int] = {}
    for unit in range(units):
        record = json.loads(record_path(work, unit).read_text(encoding="utf-8"))
        result.row_counts.add(record)
        result.unit_rows.append(len(record["kept"]))
        for at, (source_row, key, swapped, images, changes, sides) in enumerate(record["kept"]):
            reason = _duplicate_reason(seen, key, swapped)
            if reason is None:
                seen[int(key, 16)] = source_row
                rows.append((unit, at))
                result.row_counts.change(changes)
                result.sides.update(sides)
                images_of_rows.append(tuple(images) if settings.test_size else ())
                continue
            why = f"as row {seen[int(key if reason == 'duplicate' else swapped, 16)]}"
            if on_bad == "fail":
                raise DataError(f"row {source_row}: {reason}: {why}")
            result.row_counts.drop(reason, source_row, why)
    if not rows:
        raise DataError(
            f"none of the {result.row_counts.rows_in} rows is usable: "
            f"{_dropped_by_reason(result.row_counts)}"
        )
    result.splits = _split(rows, images_of_rows, settings)
    if settings.shuffle:
        for split_rows in result.splits.values():
            random.Random(settings.seed).shuffle(split_rows)
    return result


def _dropped_by_reason(row_counts: RowCounts) -> str:
    return ", ".join(
        f"{reason} {count} ({row_counts.examples[reason][0]})"
        for reason, count in row_counts.dropped.items()
    )


def _duplicate_reason(seen: dict[int, int], key: str, swapped: str) -> str | None:
    """Why a row is dropped as a copy of an earlier one: equal, or equal with swapped answers, which
    contradicts it.
    """
    if int(key, 16) in seen:
        return "duplicate"
    return "swapped_copy" if int(swapped, 16) in seen else None


def _split(
    rows: list[tuple[int, int]], images_of_rows: list[tuple[str, ...]], settings: SplitSettings
) -> dict[str, list[tuple[int, int]]]:
    """Split the rows. Rows that share an image, directly or through others, stay together."""
    if not settings.test_size:
        return {"train": rows}
    wanted = settings.test_size if settings.test_size >= 1 else settings.test_size * len(rows)
    groups = _rows_per_group(images_of_rows)
    test: set[str] = set()
    test_rows = 0
    for group in sorted(
        groups, key=lambda name: hashlib.sha256(f"{settings.seed}/{name}".encode()).digest()
    ):
        if test_rows >= wanted:
            break
        test.add(group)
        test_rows += groups[group]
    if not 0 < test_rows < len(rows):
        raise DataError(
            f"--test-size {settings.test_size:g} would take {test_rows} of {len(rows)} rows in "
            f"{len(groups)} groups that share "
            "images, and leave nothing to train on; give a smaller one"
        )
    root = _group_of_images(images_of_rows)
    splits: dict[str, list[tuple[int, int]]] = {"train": [], "test": []}
    for row, images in zip(rows, images_of_rows, strict=True):
        splits["test" if root[images[0]] in test else "train"].append(row)
    return splits


def _group_of_images(images_of_rows: list[tuple[str, ...]]) -> dict[str, str]:
    """{image: name of its group, which is one of its images}, by union-find."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for images in images_of_rows:
        for other in images[1:]:
            parent[root(other)] = root(images[0])
        root(images[0])
    return {name: root(name) for name in parent}


def _rows_per_group(images_of_rows: list[tuple[str, ...]]) -> dict[str, int]:
    """{name of the group: number of its rows}."""
    group_of = _group_of_images(images_of_rows)
    return Counter(group_of[images[0]] for images in images_of_rows)


def write(work: Path, plan: Plan, folder: Path, key: str) -> int:
    """Write the planned dataset to `folder`. Returns the bytes of its shards.

    Raises DataError for a full disk.
    """
    try:
        shutil.rmtree(folder, ignore_errors=True)
        total = 0
        for split, rows in plan.splits.items():
            own = folder / split if len(plan.splits) > 1 else folder
            own.mkdir(parents=True)
            files = _write_split(work, plan.unit_rows, rows, own)
            store.finish_folder(own, files, f"{key}{split}")
            total += sum((own / name).stat().st_size for name in files)
        if len(plan.splits) > 1:
            (folder / "dataset_dict.json").write_text(
                json.dumps({"splits": list(plan.splits)}), encoding="utf-8"
            )
    except OSError as problem:
        raise DataError(
            f"cannot write '{folder}': {problem.strerror or problem}; free some space and try again"
        ) from problem
    return total


def _write_split(
    work: Path, unit_rows: list[int], rows: list[tuple[int, int]], folder: Path
) -> list[str]:
    files: list[str] = []
    for unit, picked in _shards(rows):
        path = folder / f"data-{len(files):05d}.arrow"
        files.append(path.name)
        if unit is not None and len(picked) == unit_rows[unit]:
            _link(shard_path(work, unit), path)
            continue
        with store.ShardWriter(path) as shard:
            opened: dict[int, Any] = {}
            for start in range(0, len(picked), store.BATCH_ROWS):
                rows_of_batch = []
                for number, at in picked[start : start + store.BATCH_ROWS]:
                    if number not in opened:
                        opened[number] = store.read_shard(shard_path(work, number))
                    rows_of_batch.append(opened[number].slice(at, 1))
                shard.add_rows(rows_of_batch)
    return files


def _shards(rows: list[tuple[int, int]]) -> Iterator[tuple[int | None, list[tuple[int, int]]]]:
    """(unit, rows) of each shard: rows of one unit if they are in order, else as many as a unit
    may have, with None.
    """
    in_order = rows == sorted(rows)
    start = 0
    while start < len(rows):
        stop = start
        limit = len(rows) if in_order else min(len(rows), start + 256)
        while stop < limit and (not in_order or rows[stop][0] == rows[start][0]):
            stop += 1
        yield (rows[start][0] if in_order else None), rows[start:stop]
        start = stop


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        shutil.copyfile(source, target)
