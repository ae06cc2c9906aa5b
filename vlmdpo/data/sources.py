"""Where preference pairs come from: each known source as a stream of plain rows, checked into pairs.

A source row is RLAIF-V's: image, question, chosen, rejected. Nothing here resizes, renders or stores.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.data.images import BadImage, read
from vlmdpo.errors import DataError, nearest

DATASETS = {"scenes": "the embedded pairs", "rlaif-v": "openbmb/RLAIF-V-Dataset"}
COLUMNS = ("image", "question", "chosen", "rejected")


@dataclass(frozen=True)
class PreferencePair:
    """One checked pair: the picture's encoded bytes, the question, and the better and the worse answer."""

    image: bytes
    question: str
    chosen: str
    rejected: str


class BadRow(Exception):
    """Why a row cannot be used: `reason` is the counted name, the text says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Source:
    """A readable source: its name, a fingerprint of its content, its row count, and how to stream rows from..to."""

    name: str
    fingerprint: str
    count: int
    rows: Callable[[int, int], Iterator[dict[str, Any]]]
    image_root: Path


def check(row: dict[str, Any], image_root: Path) -> PreferencePair:
    """The pair in a source row. Raises BadRow with the reason it cannot be used."""
    texts = {}
    for column in COLUMNS[1:]:
        value = row.get(column)
        if not isinstance(value, str) or not value.strip():
            raise BadRow(f"empty_{column}", f"{column} is {value!r}")
        texts[column] = value.strip()
    if texts["chosen"] == texts["rejected"]:
        raise BadRow("identical_answers", f"chosen and rejected are both {texts['chosen'][:60]!r}")
    try:
        return PreferencePair(read(row.get("image"), image_root), **texts)
    except BadImage as problem:
        raise BadRow(problem.reason, str(problem)) from problem


def open_source(dataset: str, split: str) -> Source:
    """The source behind a Hub id, alias or local path. Raises DataError where it cannot be read or lacks a column.

    The embedded pairs are a source too, but not this room's: see `vlmdpo.tiny.pairs.source`.
    """
    path = Path(dataset).expanduser()
    if path.exists():
        return _local(path)
    if path.suffix in (".parquet", ".jsonl", ".json") or dataset.startswith((".", "/", "~")):
        raise DataError(f"no file or folder '{dataset}'")
    return _hub(DATASETS.get(dataset, dataset), dataset, split)


def bounds(source: Source, split: str, limit: int | None) -> tuple[int, int]:
    """First and last row (exclusive) of `split`, which may hold a slice, cut to `limit` rows."""
    from datasets import ReadInstruction

    name = split.split("[", 1)[0]
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: source.count})
    except (ValueError, AssertionError) as problem:
        raise DataError(f"--split: cannot read '{split}'; write it as train, train[:1%] or train[100:200]") from problem
    if len(parts) != 1:
        raise DataError(f"--split: '{split}' names several splits; give one")
    first, last = parts[0].from_ or 0, source.count if parts[0].to is None else parts[0].to
    if limit is not None:
        last = min(last, first + limit)
    if last <= first:
        raise DataError(f"--split: '{split}' of {source.count} rows is empty")
    return first, last


def _need_columns(found: list[str], where: str) -> None:
    missing = [column for column in COLUMNS if column not in found]
    if missing:
        raise DataError(
            f"{where}: missing column {', '.join(missing)}; found {', '.join(found) or 'none'}; wanted {', '.join(COLUMNS)}"
        )


def _local(path: Path) -> Source:
    if path.is_dir() and (path / "state.json").exists():
        return _saved(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".parquet", ".jsonl"))
        if not files:
            raise DataError(f"'{path}' holds no .parquet or .jsonl file and is no save_to_disk folder")
    else:
        files = [path]
    kinds = {file.suffix for file in files}
    root = path if path.is_dir() else path.parent
    if kinds == {".parquet"}:
        return _parquet(files, str(path), root)
    if kinds == {".jsonl"}:
        return _jsonl(files, str(path), root)
    raise DataError(f"'{path}': give .parquet or .jsonl files, one kind at a time, not {', '.join(sorted(kinds)) or 'none'}")


def _fingerprint(files: list[Path]) -> str:
    """Names, sizes and times of files: changes whenever one is written, and costs no reading."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def _saved(path: Path) -> Source:
    from datasets import Dataset, Image, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as problem:
        raise DataError(f"'{path}' cannot be read as a save_to_disk folder: {problem}") from problem
    if not isinstance(dataset, Dataset):
        raise DataError(f"'{path}' holds splits {', '.join(dataset)}; give the folder of one, as '{path}/train'")
    _need_columns(dataset.column_names, f"'{path}'")
    if isinstance(dataset.features["image"], Image):
        dataset = dataset.cast_column("image", Image(decode=False))  # bytes as stored: decoding is data.images' work
    return Source(str(path), _fingerprint(sorted(path.glob("*"))), len(dataset), _dataset_rows(dataset), path)


def _dataset_rows(dataset: Any) -> Callable[[int, int], Iterator[dict[str, Any]]]:
    def stream(first: int, last: int) -> Iterator[dict[str, Any]]:
        return iter(dataset.select(range(first, last)))

    return stream


def _parquet(files: list[Path], name: str, root: Path) -> Source:
    import pyarrow
    import pyarrow.parquet as pq

    counts = []
    for file in files:
        try:
            meta = pq.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as problem:
            raise DataError(f"'{file}' is no readable Parquet file: {str(problem).splitlines()[0]}") from problem
        _need_columns(meta.schema_arrow.names, f"'{file}'")
        counts.append(meta.metadata.num_rows)

    def stream(first: int, last: int) -> Iterator[dict[str, Any]]:
        start = 0
        for file, count in zip(files, counts, strict=True):
            if start < last and start + count > first:
                row = start
                for batch in pq.ParquetFile(file).iter_batches(batch_size=64, columns=list(COLUMNS)):
                    for record in batch.to_pylist():
                        if first <= row < last:
                            yield record
                        row += 1
            start += count

    return Source(name, _fingerprint(files), sum(counts), stream, root)


def _jsonl(files: list[Path], name: str, root: Path) -> Source:
    places = [(file, number) for file in files for number, line in enumerate(_lines(file), start=1) if line.strip()]
    if places:
        _need_columns(
            list(_record(places[0][0], places[0][1], next(line for line in _lines(files[0]) if line.strip()))), f"'{name}'"
        )

    def stream(first: int, last: int) -> Iterator[dict[str, Any]]:
        row = 0
        for file in files:
            for number, line in enumerate(_lines(file), start=1):
                if line.strip():
                    if first <= row < last:
                        yield _record(file, number, line)
                    row += 1

    return Source(name, _fingerprint(files), len(places), stream, root)


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8") as handle:
            yield from handle
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"'{file}' cannot be read as UTF-8 text: {problem}") from problem


def _record(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as problem:
        raise DataError(f"'{file}' line {number} is no valid JSON: {problem}") from problem
    if not isinstance(record, dict):
        raise DataError(f"'{file}' line {number} must be a JSON object with {', '.join(COLUMNS)}")
    return record


def _hub(repo: str, asked: str, split: str) -> Source:
    from datasets import Image, load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    name = split.split("[", 1)[0]
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would report every retry
    ui.say(f"opening dataset {repo}")
    try:
        dataset = load_dataset(repo, split=name)
    except (DatasetNotFoundError, HFValidationError, FileNotFoundError) as problem:
        hint = nearest(asked, DATASETS)
        raise DataError(f"no dataset '{repo}' here or on the Hub.{hint} Aliases: {', '.join(DATASETS)}") from problem
    except (OfflineModeIsEnabled, ConnectionError, HfHubHTTPError) as problem:
        hint = "" if asked in DATASETS else nearest(asked, DATASETS)
        raise DataError(f"cannot reach the Hub for dataset '{repo}', and it is not in the cache.{hint}") from problem
    except ValueError as problem:
        raise DataError(f"dataset '{repo}': {str(problem).splitlines()[0]}") from problem
    _need_columns(dataset.column_names, f"dataset '{repo}'")
    if isinstance(dataset.features["image"], Image):
        dataset = dataset.cast_column("image", Image(decode=False))
    return Source(repo, dataset._fingerprint, len(dataset), _dataset_rows(dataset), Path("."))
