"""The prepared dataset on disk: Arrow shards for `datasets.load_from_disk`, and a manifest.

Rows hold what TRL takes (`images`, `prompt`, `chosen`, `rejected` as messages, nothing rendered),
`source_row`, token counts, and digests of images and prompt. While it is made, it lies under a
hidden name, unit by unit, so that a killed run can continue; it gets its own name only when it is
complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.data.groups import IMAGE_DIGEST, PROMPT_DIGEST, image_digest, prompt_digest
from vlmdpo.data.images import EncodedImage
from vlmdpo.data.pairs import PreferencePair, TokenCounts
from vlmdpo.errors import DataError

MANIFEST = "manifest.json"
FORMAT = 4  # of the rows below, and what is made of a source; older results are not reused
COUNTS = ("prompt_tokens", "chosen_tokens", "rejected_tokens", "image_tokens")
# Folders beside the rows that trainings write.
REFERENCE_CACHE, FEATURE_CACHE = CACHES = ("reference-logprobs", "image-features")
BATCH_ROWS = 16  # written at once: bounds memory


def key_of(facts: dict[str, Any]) -> str:
    """The key of a preparation: a hash of everything that changes its result."""
    return hashlib.sha256(
        json.dumps({**facts, "format": FORMAT}, sort_keys=True).encode()
    ).hexdigest()[:12]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a prepared folder; None for any other folder."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or not ours: the folder is not prepared
        return None
    return manifest if isinstance(manifest, dict) and "key" in manifest else None


def check_target(folder: Path) -> None:
    """Raise DataError for a folder that cannot be made or replaced: a file, the folder that is
    worked in, or one above it.
    """
    if folder.is_file():
        raise DataError(f"--output-dir: '{folder}' is a file")
    whole = folder.resolve()
    if not folder.name or folder.name == ".." or Path.cwd().is_relative_to(whole):
        raise DataError(
            f"--output-dir: '{folder}' is the working folder or above it, and would be replaced; "
            "name a folder of its own"
        )


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise DataError for a folder that holds anything but a prepared dataset."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError(f"--output-dir: '{folder}' is a file")
    if any(folder.iterdir()):
        if read_manifest(folder) is None:
            raise DataError(
                f"--output-dir: '{folder}' holds something else; choose an empty or new folder"
            )
        if not overwrite and not ui.confirm(
            f"'{folder}' holds data prepared with other settings. Replace it?"
        ):
            raise DataError(
                f"--output-dir: '{folder}' holds data prepared with other settings; add "
                "--overwrite or choose another folder"
            )


def pair_features() -> Any:
    """The columns of a pair; `images` decodes to a list of RGB images."""
    from datasets import Features, Image, List, Value

    part = {"type": Value("string"), "text": Value("string")}
    messages = List({"role": Value("string"), "content": List(part)})
    return Features(
        {
            "images": List(Image(mode="RGB")),
            "prompt": messages,
            "chosen": messages,
            "rejected": messages,
        }
    )


def features() -> Any:
    """The columns of a prepared dataset: a pair, its source row, its token counts, and digests of
    its images and of its prompt, equal for rows that share them.
    """
    from datasets import Features, Value

    return Features(
        {
            **pair_features(),
            "source_row": Value("int64"),
            **{name: Value("int32") for name in COUNTS},
            **{name: Value("string") for name in (IMAGE_DIGEST, PROMPT_DIGEST)},
        }
    )


def row_of(
    pair: PreferencePair, images: Sequence[EncodedImage], counts: TokenCounts, source_row: int
) -> dict[str, Any]:
    """A pair as a row of the dataset."""
    digest = image_digest(image.data for image in images)
    return {
        "images": [{"bytes": image.data, "path": None} for image in images],
        "prompt": list(pair.prompt),
        "chosen": [pair.chosen],
        "rejected": [pair.rejected],
        "source_row": source_row,
        "prompt_tokens": counts.prompt,
        "chosen_tokens": counts.chosen,
        "rejected_tokens": counts.rejected,
        "image_tokens": counts.images,
        IMAGE_DIGEST: digest,
        PROMPT_DIGEST: prompt_digest(list(pair.prompt), digest),
    }


class ShardWriter:
    """Writes rows to one Arrow file, which gets its name when it is closed without an error."""

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, path.with_name(f"{path.name}.{os.getpid()}")

    def __enter__(self) -> ShardWriter:
        import pyarrow

        self._schema = features().arrow_schema
        self._file = pyarrow.OSFile(str(self._partial), "wb")
        self._stream = pyarrow.ipc.new_stream(self._file, self._schema)
        self._pending: list[dict[str, Any]] = []
        return self

    def add(self, row: dict[str, Any]) -> None:
        """One row of `row_of`."""
        self._pending.append(row)
        if len(self._pending) == BATCH_ROWS:
            self._flush()

    def add_rows(self, tables: list[Any]) -> None:
        """Rows of other shards, unchanged, as one batch."""
        import pyarrow

        self._stream.write_table(pyarrow.concat_tables(tables).combine_chunks())

    def _flush(self) -> None:
        import pyarrow

        if self._pending:
            self._stream.write_batch(
                pyarrow.RecordBatch.from_pylist(self._pending, schema=self._schema)
            )
        self._pending = []

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            with contextlib.ExitStack() as closing:
                closing.callback(self._file.close)
                closing.callback(self._stream.close)
        if kind is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink(missing_ok=True)


def read_shard(path: Path) -> Any:
    """A shard as a memory-mapped table: rows take memory only when they are accessed."""
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()


def finish_folder(folder: Path, files: Sequence[str], key: str) -> None:
    """Write the two files that make a folder of shards one of `save_to_disk`."""
    from datasets import DatasetInfo

    DatasetInfo(features=features()).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": key,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")


def split_folder(folder: Path, split: str = "train") -> Path:
    """The folder of a split: a subfolder if there is a test split, else the prepared folder."""
    return folder / split if (folder / "dataset_dict.json").exists() else folder


def has_test_split(folder: Path) -> bool:
    """Whether a prepared folder has a test split, by `--test-size`."""
    return split_folder(folder, "test") != folder and (folder / "test").is_dir()


def load(folder: Path, split: str = "train") -> Any:
    """A split of a prepared folder as `datasets.Dataset`. Raises DataError if it is damaged."""
    from datasets import load_from_disk

    try:
        return load_from_disk(str(split_folder(folder, split)))
    except (OSError, ValueError, KeyError) as problem:
        raise DataError(
            f"'{folder}' is damaged ({problem}); run vlmdpo prepare again with --overwrite"
        ) from problem


def replace(folder: Path, finished: Path) -> None:
    """Move `finished` to `folder`. What was there before is removed afterwards, all but its caches:
    what they hold is found by content, which the new rows may share.
    """
    old = finished.with_name("old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    finished.rename(folder)
    for cache in CACHES:
        if (old / cache).is_dir():
            (old / cache).rename(folder / cache)
    shutil.rmtree(old, ignore_errors=True)
