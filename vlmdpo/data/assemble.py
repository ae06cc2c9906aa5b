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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.data import mixture, store
from vlmdpo.data.mixture import Part
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
    """The rows of each split, as (unit, index), in order, and what happened to all rows.

    Attributes:
        unit_rows: the rows of each unit's shard.
        sides: images by their longer side in pixels.
        parts: for each source: rows_in, usable rows, and rows_out, repeats included.
    """

    row_counts: RowCounts
    splits: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    unit_rows: list[int] = field(default_factory=list)
    sides: Counter[int] = field(default_factory=Counter)
    parts: list[dict[str, int]] = field(default_factory=list)


@dataclass
class _Kept:
    """The rows that are kept, in order: place, source of several, images."""

    rows: list[tuple[int, int]] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    images: list[tuple[str, ...]] = field(default_factory=list)


def plan(
    work: Path, units: int, parts: Sequence[Part], settings: SplitSettings, on_bad: str
) -> Plan:
    """Decide from the units' records which rows are kept, how often, and in which split.

    Raises:
        DataError: no row is left, an empty split, or a duplicate if `on_bad` is "fail".
    """
    result = Plan(RowCounts(), parts=[Counter(rows_in=0, usable=0, rows_out=0) for _ in parts])
    kept = _Kept()
    copies_of = _Copies(_last_votes(work, units))
    for unit, record in _records(work, units):
        part = parts[record["part"]]
        result.row_counts.add(record)
        result.unit_rows.append(len(record["kept"]))
        result.parts[record["part"]]["rows_in"] += record["rows_in"]
        for at, (number, key, swapped, images, changes, sides) in enumerate(record["kept"]):
            name = part.row(number - record["offset"])
            voted = str(at) in record["votes"]
            reason, why = copies_of.add((unit, at), key, swapped, name, voted=voted)
            if not reason:
                kept.rows.append((unit, at))
                kept.parts.append(record["part"])
                kept.images.append(tuple(images) if settings.test_size else ())
                result.row_counts.change(changes)
                result.sides.update(sides)
                continue
            if on_bad == "fail" and not voted:
                raise DataError(f"{name} (counted from 0): {reason}: {why}")
            result.row_counts.drop(reason, name, why)
    if not kept.rows:
        raise DataError(
            f"of {ui.count(result.row_counts.rows_in, 'row')} none is usable: "
            f"{_dropped_by_reason(result.row_counts)}"
        )
    _mix_and_split(result, kept, [part.weight for part in parts], settings)
    return result


def _mix_and_split(
    result: Plan, kept: _Kept, weights: Sequence[float], settings: SplitSettings
) -> None:
    """Take each source's share before rows are split, and repeat rows of the training split."""
    taken = mixture.copies(weights, kept.parts, settings.seed)
    of_row = dict(zip(kept.rows, zip(kept.parts, taken, strict=True), strict=True))
    picked = [at for at, times in enumerate(taken) if times]
    if not picked:
        raise DataError("--mix leaves none of the usable rows; give larger numbers")
    result.splits = _split(
        [kept.rows[at] for at in picked], [kept.images[at] for at in picked], settings
    )
    result.splits["train"] = [row for row in result.splits["train"] for _ in range(of_row[row][1])]
    for part in kept.parts:
        result.parts[part]["usable"] += 1
    for rows in result.splits.values():
        for row in rows:
            result.parts[of_row[row][0]]["rows_out"] += 1
    if settings.shuffle:
        for split_rows in result.splits.values():
            random.Random(settings.seed).shuffle(split_rows)


def _records(work: Path, units: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for unit in range(units):
        yield unit, json.loads(record_path(work, unit).read_text(encoding="utf-8"))


def _last_votes(work: Path, units: int) -> dict[int, tuple[int, int, str]]:
    """The place (unit, index) and key of the last vote on each question and pair of answers.

    People correct their votes, and a file of votes is appended to.
    """
    last: dict[int, tuple[str, int, int, str]] = {}
    for unit in range(units):
        text = record_path(work, unit).read_text(encoding="utf-8")
        if '"votes": {}' in text:  # as of all other data
            continue
        record = json.loads(text)
        for at, voted_at in record["votes"].items():
            key, swapped = record["kept"][int(at)][1:3]
            vote = (voted_at, unit, int(at), key)
            pair = _either_way(key, swapped)
            last[pair] = max(last.get(pair, vote), vote)
    return {pair: (unit, at, key) for pair, (_, unit, at, key) in last.items()}


def _either_way(key: str, swapped: str) -> int:
    """The same number for a pair and its swapped copy."""
    return min(int(key, 16), int(swapped, 16))


class _Copies:
    """Tells copies of rows. The last vote on a pair of answers counts; else the first row does.

    Args:
        last_votes: the place and key of the last vote on each pair.
    """

    def __init__(self, last_votes: dict[int, tuple[int, int, str]]) -> None:
        self._last_votes = last_votes
        self._seen: dict[int, str] = {}

    def add(
        self, place: tuple[int, int], key: str, swapped: str, name: str, *, voted: bool
    ) -> tuple[str, str]:
        """The reason why a row is dropped, and more about it; "" for a row that is kept."""
        vote = self._last_votes.get(_either_way(key, swapped))
        if vote is not None:
            if vote[:2] == place:
                return "", ""
            if voted:
                return "earlier_vote", "a later vote on these answers counts"
            return ("duplicate" if vote[2] == key else "swapped_copy"), "a vote counts instead"
        own, other = int(key, 16), int(swapped, 16)
        if own in self._seen:
            return "duplicate", f"as {self._seen[own]}"
        if other in self._seen:  # contradicts it
            return "swapped_copy", f"as {self._seen[other]}"
        self._seen[own] = name
        return "", ""


def _dropped_by_reason(row_counts: RowCounts) -> str:
    return ", ".join(
        f"{reason} {count} ({row_counts.examples[reason][0]})"
        for reason, count in row_counts.dropped.items()
    )


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
            f"--test-size {settings.test_size:g} would take {test_rows:,} of "
            f"{ui.count(len(rows), 'row')} in "
            f"{ui.count(len(groups), 'group')} that share "
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
        if unit is not None and picked == [(unit, at) for at in range(unit_rows[unit])]:
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
