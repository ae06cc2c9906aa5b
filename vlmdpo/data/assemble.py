"""Checked units → the prepared dataset: copies of rows dropped across units, a test set split off
by image, rows shuffled.

Where nothing has to move, a unit's shard becomes the dataset's shard as it is, by a link and not by
a copy.
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
from vlmdpo.data.work import Tally, record_path, shard_path
from vlmdpo.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Order:
    """How rows are dealt out.

    Attributes:
        test_size: below 1 a share of the rows, else a number of them; 0 keeps one set. No image is
            on both sides.
        shuffle: whether rows change their order.
        seed: of both.
    """

    test_size: float
    shuffle: bool
    seed: int


@dataclass
class Plan:
    """Which rows of which units make each split, in order, and what became of all rows."""

    tally: Tally
    splits: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    unit_rows: list[int] = field(default_factory=list)
    sides: Counter[int] = field(default_factory=Counter)  # pictures by their longer side, in pixels


def plan(work: Path, units: int, order: Order, on_bad: str) -> Plan:
    """Look at what became of every unit's rows, and decide which rows stay and where.

    Raises:
        DataError: no row is left, a test set of all or none, or a copy where `on_bad` is "fail".
    """
    made = Plan(Tally())
    rows: list[tuple[int, int]] = []
    pictures: list[tuple[str, ...]] = []
    seen: dict[int, int] = {}
    for unit in range(units):
        record = json.loads(record_path(work, unit).read_text(encoding="utf-8"))
        made.tally.add(record)
        made.unit_rows.append(len(record["kept"]))
        for at, (source_row, key, swapped, images, changes, sides) in enumerate(record["kept"]):
            reason = _copy(seen, key, swapped)
            if reason is None:
                seen[int(key, 16)] = source_row
                rows.append((unit, at))
                made.tally.change(changes)
                made.sides.update(sides)
                pictures.append(tuple(images) if order.test_size else ())
                continue
            why = f"as row {seen[int(key if reason == 'duplicate' else swapped, 16)]}"
            if on_bad == "fail":
                raise DataError(f"row {source_row}: {reason}: {why}")
            made.tally.drop(reason, source_row, why)
    if not rows:
        raise DataError(f"no usable row is left of {made.tally.rows_in}: {_listed(made.tally)}")
    made.splits = _split(rows, pictures, order)
    if order.shuffle:
        for chosen in made.splits.values():
            random.Random(order.seed).shuffle(chosen)
    return made


def _listed(tally: Tally) -> str:
    return ", ".join(
        f"{reason} {count} ({tally.examples[reason][0]})" for reason, count in tally.dropped.items()
    )


def _copy(seen: dict[int, int], key: str, swapped: str) -> str | None:
    """Why a row is a copy of an earlier one: the same, or the same with the answers swapped, which
    takes it back.
    """
    if int(key, 16) in seen:
        return "duplicate"
    return "swapped_copy" if int(swapped, 16) in seen else None


def _split(
    rows: list[tuple[int, int]], pictures: list[tuple[str, ...]], order: Order
) -> dict[str, list[tuple[int, int]]]:
    """Rows that share a picture, directly or by others, stay together; whole such groups make the
    test set.
    """
    if not order.test_size:
        return {"train": rows}
    wanted = order.test_size if order.test_size >= 1 else order.test_size * len(rows)
    groups = _groups(pictures)
    test: set[str] = set()
    held = 0
    for group in sorted(
        groups, key=lambda name: hashlib.sha256(f"{order.seed}/{name}".encode()).digest()
    ):
        if held >= wanted:
            break
        test.add(group)
        held += groups[group]
    if not 0 < held < len(rows):
        raise DataError(
            f"--test-size {order.test_size:g} would take {held} of {len(rows)} rows in "
            f"{len(groups)} groups that share "
            "pictures, and leave nothing to train on; give a smaller one"
        )
    root = _roots(pictures)
    dealt: dict[str, list[tuple[int, int]]] = {"train": [], "test": []}
    for row, shown in zip(rows, pictures, strict=True):
        dealt["test" if root[shown[0]] in test else "train"].append(row)
    return dealt


def _roots(pictures: list[tuple[str, ...]]) -> dict[str, str]:
    """Each picture's group, by the name of one of its pictures (union-find)."""
    parent: dict[str, str] = {}

    def top(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for shown in pictures:
        for other in shown[1:]:
            parent[top(other)] = top(shown[0])
        top(shown[0])
    return {name: top(name) for name in parent}


def _groups(pictures: list[tuple[str, ...]]) -> dict[str, int]:
    """Rows of each group of pictures, by the group's name."""
    root = _roots(pictures)
    found: dict[str, int] = {}
    for shown in pictures:
        found[root[shown[0]]] = found.get(root[shown[0]], 0) + 1
    return found


def write(work: Path, made: Plan, folder: Path, key: str) -> int:
    """Make `folder` the dataset that the plan says. Returns the bytes of its shards. Raises
    DataError for a full disk.
    """
    try:
        shutil.rmtree(folder, ignore_errors=True)
        total = 0
        for split, rows in made.splits.items():
            own = folder / split if len(made.splits) > 1 else folder
            own.mkdir(parents=True)
            files = _write_split(work, made.unit_rows, rows, own)
            store.finish_folder(own, files, f"{key}{split}")
            total += sum((own / name).stat().st_size for name in files)
        if len(made.splits) > 1:
            (folder / "dataset_dict.json").write_text(
                json.dumps({"splits": list(made.splits)}), encoding="utf-8"
            )
    except OSError as problem:
        raise DataError(
            f"cannot write '{folder}': {problem.strerror or problem}; free some space and run it "
            "again"
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
    """Rows shard by shard: those of one unit together where they are in order, else as many as a
    unit may have.
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
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
