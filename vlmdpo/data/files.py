"""Local sources: Parquet, JSONL, JSON, CSV, WebDataset tar, `save_to_disk`, or folders of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlmdpo.data.archives import tar_count, tar_rows
from vlmdpo.data.reasons import first_line
from vlmdpo.data.sources import ArrowRows, ParquetRows, Record, Source, Streamed, fingerprint
from vlmdpo.data.text_files import (
    count_json_lines,
    csv_dialect,
    csv_rows,
    is_json_lines,
    json_lines,
    json_rows,
)
from vlmdpo.errors import DataError

# What `datasets` and LLaMA-Factory write beside data, about it.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")


def open_local(path: Path, split: str, image_root: Path | None) -> Source:
    """The source in a file or folder. Raises DataError if it has no known kind, or several.

    Args:
        split: selects the part of a saved `DatasetDict`, or the files of a folder that are named
            after it (train-00000.parquet). What has no parts is the split train, as in `datasets`.
        image_root: the folder that image paths start from; None for the data's own folder.
    """
    name = split.partition("[")[0]
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        return _saved(path, name, image_root)
    if not path.is_dir() and not path.is_file():  # a FIFO would be waited for
        raise DataError(f"--dataset: '{path}' is neither a file nor a folder")
    files = _files_of_split(_data_files(path) if path.is_dir() else [path], name, path)
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
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and _kind(file) in _READERS
        and file.name not in _DESCRIPTIONS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
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
        if folder in files:
            raise _has_no_splits(folder, split)
        raise DataError(f"--split: no file in '{folder}' is named after '{split}'")
    return selected or files


def _has_no_splits(path: Path, split: str) -> DataError:
    return DataError(
        f"--split: '{path}' has no split '{split}'; all its rows are the split train, which can "
        "be sliced as in train[:10%]"
    )


def _parquet(files: list[Path], name: str, root: Path) -> Source:
    import pyarrow
    import pyarrow.parquet as pq

    groups, columns = [], []
    for file in files:
        try:
            meta = pq.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as problem:
            raise DataError(
                f"'{file}' is not a readable Parquet file: {first_line(problem)}"
            ) from problem
        names = meta.schema_arrow.names
        twice = [one for number, one in enumerate(names) if one in names[:number]]
        if twice:
            raise DataError(f"'{file}' has two columns named '{twice[0]}'; rename one of them")
        groups.append(
            (
                file,
                tuple(
                    meta.metadata.row_group(i).num_rows for i in range(meta.metadata.num_row_groups)
                ),
            )
        )
        columns += [column for column in names if column not in columns]
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
    return _streamed(files, name, root, json_lines, count_json_lines)


def _json(files: list[Path], name: str, root: Path) -> Source:
    """JSON files with a list of objects each, or with JSON lines."""
    if all(map(is_json_lines, files)):
        return _jsonl(files, name, root)
    records = {file: json_rows(file) for file in files}
    return _streamed(
        files, name, root, lambda file: iter(records[file]), lambda file: len(records[file])
    )


def _csv(files: list[Path], name: str, root: Path) -> Source:
    dialects = {file: csv_dialect(file) for file in files}
    return _streamed(
        files,
        name,
        root,
        lambda file: csv_rows(file, dialects[file]),
        lambda file: dialects[file].rows,
    )


def _tar(files: list[Path], name: str, root: Path) -> Source:
    return _streamed(files, name, root, tar_rows, tar_count)


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
    elif split not in ("train", path.name, str(dataset.split)):
        raise _has_no_splits(path, split)
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
