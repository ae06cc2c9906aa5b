"""Downloads of a model's files, announced: how much is to come, and on a terminal how far it is."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

from vlmdpo import ui

_WEIGHTS = ".safetensors"
_INDEX = f"model{_WEIGHTS}.index.json"


@contextlib.contextmanager
def shown_download(repo: str, revision: str | None) -> Iterator[None]:
    """Inside, files of a repository that are not in the cache are downloaded visibly.

    Nothing is shown for a complete cache, a local folder, or a process that does not print.

    Args:
        repo: a Hub id.
    """
    missing = {} if ui.is_silent() else _missing_weights(repo, revision)
    if missing:
        ui.say(f"downloading {repo} ({ui.human_bytes(sum(missing.values()))}) ...")
    # Where the user's environment decides on bars, it has the last word.
    if not missing or not ui.is_terminal() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    enable_progress_bars()
    try:
        yield
    finally:
        disable_progress_bars()


def _missing_weights(repo: str, revision: str | None) -> dict[str, int]:
    """Bytes of each weight file that is not in the cache; asks the Hub only if the cache is not
    complete. Empty where the Hub cannot be asked: loading will say why.
    """
    if constants.HF_HUB_OFFLINE or _is_cached(repo, revision):
        return {}
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=10)
    except Exception:  # noqa: BLE001 - whatever it is, loading meets it too, and reports it
        return {}
    return {
        file.rfilename: file.size or 0
        for file in info.siblings or ()
        # Only those that transformers loads: some repositories hold their weights twice.
        if file.rfilename.startswith("model")
        and file.rfilename.endswith(_WEIGHTS)
        and not isinstance(_cached(repo, file.rfilename, revision), str)
    }


def _is_cached(repo: str, revision: str | None) -> bool:
    """Whether all weights are in the cache."""
    if isinstance(_cached(repo, f"model{_WEIGHTS}", revision), str):
        return True
    index = _cached(repo, _INDEX, revision)
    if not isinstance(index, str):
        return False
    names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    return all(isinstance(_cached(repo, name, revision), str) for name in names)


def _cached(repo: str, name: str, revision: str | None) -> object:
    return try_to_load_from_cache(repo, name, revision=revision)
