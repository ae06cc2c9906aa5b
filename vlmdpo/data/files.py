"""Local sources: Parquet, JSONL, JSON, CSV, WebDataset tar, `save_to_disk`, or folders of them."""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlmdpo.data.sources import ArrowRows, ParquetRows, Record, Source, Streamed, fingerprint
from vlmdpo.errors import DataError

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def open_local(path: Path, split: str, image_root: Path | None) -> Source:
    """The source in a file or folder. Raises DataError if it has no known kind, or several.

    Args:
        split: selects the part of a saved `DatasetDict`, or the files of a folder that are named
            after it (train-00000.parquet).
        image_root: the folder that image paths start from; None for the data's own folder.
    """
    name = split.partition("[")[0]
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        return _saved(path, name, image_root)
    files = _files_of_split(_data_files(path), name, path) if path.is_dir() else [path]
    root = image_root or (path if path.is_dir() else path.parent)
    kinds = {_kind(file) for file in files}
    if len(kinds) != 1 or not kinds <= set(_READERS):
        listed = ", ".join(sorted(kinds)) or "none"
        raise DataError(
            f"'{path}': expected files of one kind ({', '.join(_READERS)}), found {listed}"
        )
    return _READERS[kinds.pop()](files, str(path), root)


def _kind(file: Path) -> str:
    name = file.name.lower()
    return ".tar" if name.endswith((".tar.gz", ".tgz")) else file.suffix.lower()


def _data_files(folder: Path) -> list[Path]:
    """The data files in a folder. JSON beside other files describes them, and has no rows."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and _kind(file) in _READERS)
    if any(_kind(file) != ".json" for file in files):
        files = [file for file in files if _kind(file) != ".json"]
    if not files:
        raise DataError(
            f"'{folder}' has no {', '.join(_READERS)} file and was not written by save_to_disk"
        )
    return files


def _files_of_split(files: list[Path], split: str, folder: Path) -> list[Path]:
    """The files named after a split, by themselves or their folder; all if no file is."""

    def is_named(file: Path) -> bool:
        return (
            file.stem == split
            or file.stem.startswith((f"{split}-", f"{split}_"))
            or file.parent.name == split
        )

    selected = [file for file in files if is_named(file)]
    if not selected and split != "train":
        raise DataError(f"--split: no file in '{folder}' is named after '{split}'")
    return selected or files


def _parquet(files: list[Path], name: str, root: Path) -> Source:
    import pyarrow
    import pyarrow.parquet as pq

    groups, columns = [], []
    for file in files:
        try:
            meta = pq.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as problem:
            raise DataError(
                f"'{file}' is not a readable Parquet file: {str(problem).splitlines()[0]}"
            ) from problem
        groups.append(
            (
                file,
                tuple(
                    meta.metadata.row_group(i).num_rows for i in range(meta.metadata.num_row_groups)
                ),
            )
        )
        columns += [column for column in meta.schema_arrow.names if column not in columns]
    count = sum(sum(rows) for _, rows in groups)
    return ParquetRows(
        name=name,
        fingerprint=fingerprint(files),
        count=count,
        root=root,
        columns=tuple(columns),
        files=tuple(groups),
    )


def _streamed(
    files: list[Path],
    name: str,
    root: Path,
    rows: Callable[[Path], Iterator[Record]],
    count: Callable[[Path], int],
) -> Source:
    return Streamed(
        name=name,
        fingerprint=fingerprint(files),
        count=sum(count(file) for file in files),
        root=root,
        stream=lambda: (row for file in files for row in rows(file)),
    )


def _jsonl(files: list[Path], name: str, root: Path) -> Source:
    return _streamed(
        files,
        name,
        root,
        _json_lines,
        lambda file: sum(bool(line.strip()) for line in _lines(file)),
    )


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as handle:
            yield from handle
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"'{file}' cannot be read as UTF-8 text: {problem}") from problem


def _json_lines(file: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            yield _parse_object(line, f"'{file}' line {number}")


def _parse_object(text: str, where: str) -> Record:
    """A JSON object. Raises DataError, naming `where`."""
    try:
        record = json.loads(text)
    except ValueError as problem:
        raise DataError(f"{where} is not valid JSON: {problem}") from problem
    return _require_object(record, where)


def _require_object(record: Any, where: str) -> Record:
    if not isinstance(record, dict):
        raise DataError(
            f"{where} must be a JSON object with the columns of a row, not {type(record).__name__}"
        )
    return record


def _json(files: list[Path], name: str, root: Path) -> Source:
    """JSON files with a list of objects each, or with JSON lines."""
    if all(
        next((line for line in _lines(file) if line.strip()), "").lstrip().startswith("{")
        for file in files
    ):
        return _jsonl(files, name, root)
    records = {file: _json_list(file) for file in files}
    return _streamed(
        files, name, root, lambda file: iter(records[file]), lambda file: len(records[file])
    )


def _json_list(file: Path) -> list[Record]:
    try:
        records = json.loads("".join(_lines(file)))
    except ValueError as problem:
        raise DataError(f"'{file}' is not valid JSON: {problem}") from problem
    if not isinstance(records, list):
        raise DataError(
            f"'{file}' must hold a list of objects, one per row, not {type(records).__name__}"
        )
    return [
        _require_object(record, f"'{file}' entry {number}") for number, record in enumerate(records)
    ]


def _csv(files: list[Path], name: str, root: Path) -> Source:
    return _streamed(files, name, root, _csv_rows, lambda file: sum(1 for _ in _csv_rows(file)))


def _csv_rows(file: Path) -> Iterator[Record]:
    reader = csv.DictReader(
        _lines(file), delimiter="\t" if _kind(file) == ".tsv" else ",", strict=True
    )
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"'{file}' line {reader.line_num} does not have as many cells as the header "
                    "has columns"
                )
            yield dict(row)
    except csv.Error as problem:
        raise DataError(f"'{file}' line {reader.line_num} is not valid CSV: {problem}") from problem


def _tar(files: list[Path], name: str, root: Path) -> Source:
    return _streamed(
        files, name, root, _tar_rows, lambda file: sum(1 for _ in _tar_groups(file, contents=False))
    )


def _tar_groups(file: Path, *, contents: bool) -> Iterator[dict[str, bytes]]:
    """WebDataset samples as {extension: content}: consecutive files with the same name up to its
    first dot.
    """
    key: tuple[str, str] | None = None
    group: dict[str, bytes] = {}
    try:
        with tarfile.open(file) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if (folder, stem) != key and group:
                    yield group
                    group = {}
                key = (folder, stem)
                opened = archive.extractfile(member) if contents else None
                group[extension.lower()] = opened.read() if opened else b""
    except (tarfile.TarError, OSError, EOFError) as problem:
        raise DataError(f"'{file}' is not a readable tar archive: {problem}") from problem
    if group:
        yield group


def _tar_rows(file: Path) -> Iterator[Record]:
    """Rows of an archive: the fields of .json, images as `images`, other texts by extension."""
    for group in _tar_groups(file, contents=True):
        row: Record = {}
        images = []
        for extension, data in group.items():
            end = "." + extension.rpartition(".")[2]
            if end in _IMAGE_SUFFIXES:
                images.append(data)
            elif end == ".json":
                row.update(_parse_object(_decode_utf8(data, file), f"'{file}': a .json member"))
            elif end in (".txt", ".cls"):
                row[extension.rpartition(".")[0] or extension] = _decode_utf8(data, file)
            else:
                row[extension] = data
        yield {**row, "images": images} if images else row


def _decode_utf8(data: bytes, file: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise DataError(f"'{file}' has a text member that is not UTF-8: {problem}") from problem


def _saved(path: Path, split: str, image_root: Path | None) -> Source:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset: Any = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as problem:
        raise DataError(f"'{path}' cannot be read as a save_to_disk folder: {problem}") from problem
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise DataError(
                f"--split: '{path}' has no split '{split}'; it has {', '.join(dataset)}"
            )
        dataset, path = dataset[split], path / split
    return from_dataset(dataset, str(path), fingerprint(sorted(path.glob("*"))), image_root or path)


def from_dataset(dataset: Any, name: str, fingerprint: str, root: Path) -> Source:
    """A `datasets.Dataset` as a source. Its images are not decoded."""
    return ArrowRows(
        name=name,
        fingerprint=fingerprint,
        count=len(dataset),
        root=root,
        columns=tuple(dataset.column_names),
        dataset=dataset,
    )


_READERS: dict[str, Callable[[list[Path], str, Path], Source]] = {
    ".parquet": _parquet,
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".tar": _tar,
}
