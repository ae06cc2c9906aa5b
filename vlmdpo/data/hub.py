"""Sources on the Hugging Face Hub, downloaded or streamed; `open_source` opens any source."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.data.files import from_dataset, open_local
from vlmdpo.data.reasons import first_line
from vlmdpo.data.sources import Source, Streamed
from vlmdpo.errors import DataError, nearest

DATASETS = {"scenes": "the embedded pairs", "rlaif-v": "openbmb/RLAIF-V-Dataset"}
_FILE_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".tar")


def open_source(
    dataset: str,
    split: str,
    *,
    image_root: Path | None = None,
    subset: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> Source:
    """The source named by a Hub id, alias or local path.

    Args:
        split: with or without a slice, which `sources.bounds` applies.
        image_root: the folder that image paths start from.
        subset, revision: configuration, and branch, tag or commit of a Hub dataset.
        streaming: read a Hub dataset while it downloads, without keeping a copy.

    Raises:
        DataError: it cannot be found or read.

    The embedded pairs are not opened here: see `vlmdpo.tiny.pairs.source`.
    """
    path = Path(dataset).expanduser()
    if path.exists():
        return open_local(path, split, image_root)
    if path.suffix in _FILE_SUFFIXES or dataset.startswith((".", "/", "~")):
        raise DataError(f"there is no file or folder '{dataset}'")
    with _translate_errors(DATASETS.get(dataset, dataset), dataset):
        return _hub(
            DATASETS.get(dataset, dataset),
            split.partition("[")[0],
            image_root,
            subset,
            revision,
            streaming,
        )


def _hub(
    repo: str,
    split: str,
    image_root: Path | None,
    subset: str | None,
    revision: str | None,
    streaming: bool,
) -> Source:
    from datasets import Image, List, config, load_dataset

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry
    ui.say(f"opening dataset {repo}")
    opened: Any = load_dataset(repo, subset, split=split, revision=revision, streaming=streaming)
    # Downloads are in the cache, and no path in the data may lead out of it.
    root = image_root or Path(config.HF_CACHE_HOME)
    if not streaming:
        return from_dataset(opened, repo, opened._fingerprint, root)
    from huggingface_hub import dataset_info

    commit = dataset_info(repo, revision=revision).sha
    for column, kind in dict(opened.features or {}).items():
        if isinstance(kind, Image):
            opened = opened.cast_column(column, Image(decode=False))
        elif isinstance(kind, List) and isinstance(kind.feature, Image):
            opened = opened.cast_column(column, List(Image(decode=False)))
    split_info = opened.info.splits.get(split) if opened.info.splits else None
    return Streamed(
        name=repo,
        fingerprint=f"{repo}@{commit}/{subset}/{split}",
        count=(split_info.num_examples or None) if split_info else None,
        root=root,
        columns=tuple(opened.column_names or ()),
        stream=lambda: _streamed(opened, repo),
    )


def _streamed(rows: Any, repo: str) -> Iterator[dict[str, Any]]:
    with _translate_errors(repo, repo):
        yield from rows


@contextmanager
def _translate_errors(repo: str, name: str) -> Iterator[None]:
    """Inside, errors of the Hub's libraries become one line that names the next step."""
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except (DatasetNotFoundError, HFValidationError, FileNotFoundError) as problem:
        hint = nearest(name, DATASETS)
        raise DataError(
            f"dataset '{repo}' was not found here or on the Hub.{hint} "
            f"Aliases: {', '.join(DATASETS)}"
        ) from problem
    except (OfflineModeIsEnabled, ConnectionError, HfHubHTTPError) as problem:
        hint = "" if name in DATASETS else nearest(name, DATASETS)
        is_offline = isinstance(problem, OfflineModeIsEnabled)
        why = "was not asked, as HF_HUB_OFFLINE is set" if is_offline else "cannot be reached"
        raise DataError(
            f"dataset '{repo}' is not in the cache, and the Hub {why}.{hint} Use a local file, or "
            "go online"
        ) from problem
    except (OSError, ValueError, DatasetGenerationError) as problem:
        raise DataError(f"dataset '{repo}': {_reason(problem)}") from problem


def _reason(problem: BaseException) -> str:
    """What went wrong with a download: `datasets` wraps the cause in errors of its own."""
    cause: BaseException | None = problem
    while cause is not None:
        if isinstance(cause, OSError) and (
            cause.errno in (errno.ENOSPC, errno.EDQUOT) or "disk space" in str(cause)
        ):
            return (
                "the disk is full; free some space, let HF_HOME name a folder on another disk, or "
                "use --streaming, which keeps nothing"
            )
        cause = cause.__cause__ or cause.__context__
    return first_line(problem)
