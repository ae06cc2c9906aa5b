"""Sources on the Hugging Face Hub, downloaded or streamed, and the one door to every source by its
name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.data.files import local, of_dataset
from vlmdpo.data.sources import Source, Streamed
from vlmdpo.errors import DataError, nearest

DATASETS = {"scenes": "the embedded pairs", "rlaif-v": "openbmb/RLAIF-V-Dataset"}
_FILES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".tar")


def open_source(
    dataset: str,
    split: str,
    *,
    image_root: Path | None = None,
    subset: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> Source:
    """The source behind a Hub id, alias or local path.

    Args:
        split: with or without a slice, which `sources.bounds` cuts.
        image_root: where paths of pictures start.
        subset, revision: of a Hub dataset: its configuration, and branch, tag or commit.
        streaming: read a Hub dataset as it is downloaded, keeping no copy.

    Raises:
        DataError: it cannot be found or read.

    The embedded pairs are a source too, but not this room's: see `vlmdpo.tiny.pairs.source`.
    """
    path = Path(dataset).expanduser()
    if path.exists():
        return local(path, split, image_root)
    if path.suffix in _FILES or dataset.startswith((".", "/", "~")):
        raise DataError(f"no file or folder '{dataset}'")
    with _explained(DATASETS.get(dataset, dataset), dataset):
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

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would report every retry
    ui.say(f"opening dataset {repo}")
    opened: Any = load_dataset(repo, subset, split=split, revision=revision, streaming=streaming)
    # What was downloaded lies in the cache, and no path of the data's may lead out of it.
    root = image_root or Path(config.HF_CACHE_HOME)
    if not streaming:
        return of_dataset(opened, repo, opened._fingerprint, root)
    from huggingface_hub import dataset_info

    commit = dataset_info(repo, revision=revision).sha
    for column, kind in dict(opened.features or {}).items():
        if isinstance(kind, Image):
            opened = opened.cast_column(column, Image(decode=False))
        elif isinstance(kind, List) and isinstance(kind.feature, Image):
            opened = opened.cast_column(column, List(Image(decode=False)))
    known = opened.info.splits.get(split) if opened.info.splits else None
    return Streamed(
        name=repo,
        fingerprint=f"{repo}@{commit}/{subset}/{split}",
        count=(known.num_examples or None) if known else None,
        root=root,
        columns=tuple(opened.column_names or ()),
        stream=lambda: _streamed(opened, repo),
    )


def _streamed(rows: Any, repo: str) -> Iterator[dict[str, Any]]:
    with _explained(repo, repo):
        yield from rows


@contextmanager
def _explained(repo: str, asked: str) -> Iterator[None]:
    """Turns what the Hub's libraries raise into one line that names the next step."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except (DatasetNotFoundError, HFValidationError, FileNotFoundError) as problem:
        hint = nearest(asked, DATASETS)
        raise DataError(
            f"no dataset '{repo}' here or on the Hub.{hint} Aliases: {', '.join(DATASETS)}"
        ) from problem
    except (OfflineModeIsEnabled, ConnectionError, HfHubHTTPError) as problem:
        hint = "" if asked in DATASETS else nearest(asked, DATASETS)
        raise DataError(
            f"cannot reach the Hub for dataset '{repo}', and it is not in the cache.{hint} Give a "
            "local file, or go online"
        ) from problem
    except ValueError as problem:
        raise DataError(f"dataset '{repo}': {str(problem).splitlines()[0]}") from problem
