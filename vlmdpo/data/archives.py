"""Rows of WebDataset tar archives."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmdpo.data.image_cells import MAX_BYTES
from vlmdpo.data.json_rows import parse
from vlmdpo.data.reasons import BadImage, BadRow, UnreadableRow, first_line, shown
from vlmdpo.errors import DataError

Record = dict[str, Any]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_VIDEO_SUFFIXES = (".mp4", ".avi", ".webm", ".mov", ".mkv")
_Sample = dict[str, bytes | BadRow]  # the content of each member by its extension


def tar_count(file: Path) -> int:
    """The number of rows of `tar_rows`. Raises DataError."""
    return sum(1 for _ in _samples(file, contents=False))


def tar_rows(file: Path) -> Iterator[Record]:
    """Rows of an archive: the fields of .json, images as `images`, other texts by extension.

    Raises DataError for a file that is no archive.
    """
    for sample in _samples(file, contents=True):
        try:
            yield _row(sample)
        except BadRow as problem:
            yield UnreadableRow(problem.reason, str(problem))


def _samples(file: Path, *, contents: bool) -> Iterator[_Sample]:
    """Consecutive members with the same name up to its first dot, by the rest of the name."""
    key: tuple[str, str] | None = None
    sample: _Sample = {}
    try:
        with tarfile.open(file) as archive:
            for member in archive:
                if member.isdir():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if (folder, stem) != key and sample:
                    yield sample
                    sample = {}
                key, extension = (folder, stem), extension.lower()
                content = _content(archive, member, extension) if contents else b""
                if extension in sample:
                    content = _merged(member.name, "another one of this name")
                sample[extension] = content
    except (tarfile.TarError, OSError, EOFError) as problem:
        raise DataError(
            f"'{file}' is not a readable tar archive: {first_line(problem)}"
        ) from problem
    if sample:
        yield sample


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> bytes | BadRow:
    """The bytes of a member, links followed within the archive; or why its row is bad."""
    name = shown(member.name)
    if "." + extension.rpartition(".")[2] in _VIDEO_SUFFIXES:
        return BadRow("video", f"the archive holds {name}; only images are supported")
    if member.size > MAX_BYTES:  # of a sparse member, too, which takes no space in the archive
        size = f"{member.size / 1e6:,.0f} MB, more than {MAX_BYTES / 1e6:,.0f} MB"
        return BadImage("oversized_image", f"{name} has {size}")
    try:
        opened = archive.extractfile(member)
    except (KeyError, RecursionError):  # a link to nothing, or to itself
        opened = None
    if opened is None:
        return BadImage("missing_image", f"{name} is a link to no file in the archive, or a device")
    data = opened.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        return BadImage("oversized_image", f"{name} is a link to more than {MAX_BYTES:,} bytes")
    return data


def _merged(name: str, other: str) -> BadRow:
    return BadRow(
        "merged_samples",
        f"{shown(name)} and {other} fall into one sample, because the name of a WebDataset sample "
        "ends at its first dot",
    )


def _row(sample: _Sample) -> Record:
    """The columns of a sample. Raises BadRow."""
    row: Record = {}
    images: list[bytes] = []
    records = [name for name in sample if name.rpartition(".")[2] == "json"]
    if len(records) > 1:
        raise _merged(records[0], shown(records[1]))
    for extension, data in sample.items():
        if isinstance(data, BadRow):
            raise data
        end = "." + extension.rpartition(".")[2]
        if end in IMAGE_SUFFIXES:
            images.append(data)
        elif end == ".json":
            row.update(_fields(_text(data)))
        elif end in (".txt", ".cls"):
            row[extension.rpartition(".")[0] or extension] = _text(data)
        else:
            row[extension] = data
    return {**row, "images": images} if images else row


def _text(data: bytes) -> str:
    """UTF-8; other bytes become lone surrogates, by which the row is dropped."""
    return data.decode("utf-8-sig", errors="surrogateescape")


def _fields(text: str) -> Record:
    try:
        fields = parse(text)
    except ValueError as problem:
        raise BadRow("bad_json", f"a .json member is not valid JSON: {problem}") from problem
    if not isinstance(fields, dict):
        raise BadRow("bad_json", f"a .json member holds {type(fields).__name__}, not an object")
    return fields
