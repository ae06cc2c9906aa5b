"""COCO's annotation files of 2014, read as streams: they hold up to 450 MB each.

The layout: an object with the lists `images` (id, file_name), `annotations` (image_id, and
category_id or caption) and, for instances, `categories` (id, name).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdpo.benchmarks import files
from vlmdpo.benchmarks.chair import json_stream
from vlmdpo.errors import DataError

_SPLITS = ("val", "train")
# What is read of a file: by list, the keys of its entries and their kinds.
_CAPTIONS: Mapping[str, Mapping[str, type]] = {"annotations": {"image_id": int, "caption": str}}
_INSTANCES: Mapping[str, Mapping[str, type]] = {
    "images": {"id": int, "file_name": str},
    "annotations": {"image_id": int, "category_id": int},
    "categories": {"id": int, "name": str},
}
_GET = "unpack COCO's annotations_trainval2014.zip there, or name its folder with --data DIR"


@dataclass(frozen=True)
class Coco:
    """What the files of boxes hold.

    Attributes:
        names: by id, the file name of each image of either split.
        val: file names of val2014, sorted.
        boxes: by id, the categories of an image's boxes, sorted; those of crowds too.
    """

    names: Mapping[int, str]
    val: Sequence[str]
    boxes: Mapping[int, Sequence[str]]


@dataclass(frozen=True)
class CocoFiles:
    """The four files of a folder."""

    instances: Mapping[str, Path]
    captions: Mapping[str, Path]

    def digest(self) -> str:
        """Identifies the content of all four. Takes some seconds. Raises DataError."""
        paths = [*self.instances.values(), *self.captions.values()]
        return files.digest(paths[0].parent, [path.name for path in paths])

    def read(self, known_categories: Iterable[str]) -> Coco:
        """The images and boxes of both splits.

        Raises DataError, also for categories other than `known_categories`.
        """
        names: dict[int, str] = {}
        of_val: list[str] = []
        boxes: dict[int, set[int]] = {}
        categories: dict[int, str] = {}
        for split, path in self.instances.items():
            for name, entry in _entries(path, _INSTANCES):
                if name == "annotations":
                    boxes.setdefault(entry["image_id"], set()).add(entry["category_id"])
                elif name == "images":
                    names[entry["id"]] = entry["file_name"]
                    if split == "val":
                        of_val.append(entry["file_name"])
                elif split == "train":  # as the published scorers do
                    categories[entry["id"]] = entry["name"]
        self._check_categories(categories, boxes, known_categories)
        named = {i: sorted(categories[number] for number in found) for i, found in boxes.items()}
        return Coco(names, sorted(of_val), named)

    def _check_categories(
        self,
        categories: Mapping[int, str],
        boxes: Mapping[int, set[int]],
        known_categories: Iterable[str],
    ) -> None:
        path = self.instances["train"]
        wrong = set(categories.values()).symmetric_difference(known_categories)
        if wrong:
            raise DataError(
                f"'{path}' does not have COCO's 80 categories: {min(wrong)!r} is in one list only; "
                "is --data COCO's annotation folder?"
            )
        unknown = set[int]().union(*boxes.values()) - categories.keys()
        if unknown:
            raise DataError(f"'{path}' has no category {min(unknown)}, which a box has; {_GET}")

    def references(self, ids: frozenset[int]) -> Iterator[tuple[int, str]]:
        """(image id, reference caption) of these images. Raises DataError."""
        for path in self.captions.values():
            for _, entry in _entries(path, _CAPTIONS):
                if entry["image_id"] in ids:
                    yield entry["image_id"], entry["caption"]


def find(folder: Path) -> CocoFiles:
    """The files of COCO's annotation folder. Raises DataError if one is missing."""
    files.require_folder(folder, f"; {_GET}")
    found = {
        kind: {split: folder / f"{kind}_{split}2014.json" for split in _SPLITS}
        for kind in ("instances", "captions")
    }
    missing = [path.name for paths in found.values() for path in paths.values() if not _is(path)]
    if not missing:
        return CocoFiles(found["instances"], found["captions"])
    lacks = f"'{folder}' lacks {', '.join(missing)}"
    if any(folder.glob("*_*2017.json")):
        raise DataError(f"{lacks}: it holds COCO's files of 2017, and CHAIR needs those of 2014")
    if any(_is(folder / "annotations" / name) for name in missing):
        raise DataError(f"{lacks}; did you mean --data '{folder / 'annotations'}'?")
    raise DataError(f"{lacks}; CHAIR needs all four, boxes and captions of both splits: {_GET}")


def _is(path: Path) -> bool:
    return path.is_file()


def _entries(
    path: Path, lists: Mapping[str, Mapping[str, type]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of its list, entry) of each entry of these lists. Raises DataError."""
    seen = set()
    for name, number, entry in json_stream.entries(path, lists):
        seen.add(name)
        _check(path, name, number, entry, lists[name])
        yield name, entry
    for name in lists:
        if name not in seen:
            raise DataError(f"'{path}' is not in COCO's layout: it lists no {name}; {_GET}")


def _check(path: Path, name: str, number: int, entry: object, kinds: Mapping[str, type]) -> None:
    if isinstance(entry, dict) and all(type(entry.get(key)) is kind for key, kind in kinds.items()):
        return
    where = f"'{path}' is not in COCO's layout: entry {number} (counted from 0) of {name}"
    if not isinstance(entry, dict):
        raise DataError(f"{where} is not an object")
    files.require(entry, kinds, where)
