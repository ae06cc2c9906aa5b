"""The prepared dataset on disk: Arrow shards that `datasets.load_from_disk` reads, and a manifest beside them.

Rows are {"images": [picture], "prompt": messages, "chosen": messages, "rejected": messages}: what TRL takes, with
nothing rendered, so that the same data serves any model. A folder appears under its name only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlmdpo.data.sources import PreferencePair
from vlmdpo.errors import DataError

MANIFEST = "manifest.json"
FORMAT = 1  # of the rows below; part of the key, so that older results are not reused
_SHARD_ROWS = 2_000


def key_of(facts: dict[str, Any]) -> str:
    """What names one preparation: a hash of all that changes its result."""
    return hashlib.sha256(json.dumps({**facts, "format": FORMAT}, sort_keys=True).encode()).hexdigest()[:12]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a prepared folder; None where the folder is no such thing."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent or not ours: "not prepared" is the answer, not an error
        return None
    return manifest if isinstance(manifest, dict) and "key" in manifest else None


def usable_output(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds anything but an earlier result of ours. Raises DataError."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError(f"--output-dir: '{folder}' is a file")
    if any(folder.iterdir()):
        if read_manifest(folder) is None:
            raise DataError(f"--output-dir: '{folder}' holds something else; give an empty or new folder")
        if not overwrite:
            raise DataError(f"--output-dir: '{folder}' holds data prepared otherwise; add --overwrite or give another folder")


def write(folder: Path, pairs: Iterator[PreferencePair], describe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Write pairs as shards under a temporary name, then the manifest, then rename. Returns the manifest.

    Args:
        folder: the final name; whatever is there is replaced in the last moment.
        pairs: the checked pairs, in order, their pictures bounded.
        describe: called at the end for the manifest's facts (counts are known only then).
    """
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        files, rows = _write_shards(partial, pairs)
        if rows == 0:
            raise DataError(f"no usable row is left: {describe()['dropped']}")
        size = sum((partial / name).stat().st_size for name in files)
        manifest = {**describe(), "rows_out": rows, "bytes": size}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as problem:
        raise DataError(f"cannot write '{folder}': {problem.strerror or problem}") from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def features() -> Any:
    """The columns of a prepared dataset; `images` decodes to a list of PIL pictures."""
    from datasets import Features, Image, List, Value

    messages = List({"role": Value("string"), "content": Value("string")})
    return Features({"images": List(Image(decode=True)), "prompt": messages, "chosen": messages, "rejected": messages})


def _row(pair: PreferencePair) -> dict[str, Any]:
    return {
        "images": [{"bytes": pair.image, "path": None}],
        "prompt": [{"role": "user", "content": pair.question}],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }


def _write_shards(folder: Path, pairs: Iterator[PreferencePair]) -> tuple[list[str], int]:
    from datasets import DatasetInfo
    from datasets.arrow_writer import ArrowWriter

    files: list[str] = []
    writer, rows = None, 0
    for pair in pairs:
        if rows % _SHARD_ROWS == 0:
            if writer is not None:
                writer.finalize()
            files.append(f"data-{len(files):05d}.arrow")
            writer = ArrowWriter(features=features(), path=str(folder / files[-1]))
        assert writer is not None
        writer.write(_row(pair))
        rows += 1
    if writer is not None:
        writer.finalize()
    # The two small files that make the folder a `save_to_disk` one.
    DatasetInfo(features=features()).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": hashlib.sha256(str(folder).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    return files, rows


def load(folder: Path) -> Any:
    """The prepared `datasets.Dataset`. Raises DataError where the folder is damaged."""
    from datasets import load_from_disk

    try:
        return load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as problem:
        raise DataError(f"'{folder}' is damaged ({problem}); run vlmdpo prepare again with --overwrite") from problem
