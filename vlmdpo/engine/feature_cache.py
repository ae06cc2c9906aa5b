"""Image features on disk, for vision towers that do not train: the tower then runs once per image,
ever.

It pays where the tower's work is large beside its tokens (Idefics2) and images are seen again: more
rows, more epochs, more runs. One safetensors file for the images of a row, below the prepared data,
which all rows with the same images share (see `content_keys`). This module knows nothing of models.

Shapes: N images, I tokens of an image, H hidden size.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import ModelOutput

from vlmdpo import ui
from vlmdpo.data.store import FEATURE_CACHE
from vlmdpo.errors import ModelError

_POOLED, _DEEPSTACK = "pooler_output", "deepstack_features"  # transformers' names
# What towers return besides, and no model reads.
_NOT_READ = {"last_hidden_state", "hidden_states", "attentions"}


class FeatureCache:
    """The image features of rows, by the keys of their images.

    A file that cannot be read is reported, not used, and written anew.

    Args:
        folder: the prepared dataset's folder; files lie in a folder below it.
        key: see `reference_cache.cache_key`. What is on disk under another key is never read.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.path = folder / FEATURE_CACHE / key
        self._name_old_folders()

    @property
    def num_known(self) -> int:
        """How many files of features there are: one for the images of a row."""
        return sum(1 for _ in self.path.rglob("*.safetensors"))

    def get(self, image_keys: Sequence[str], device: torch.device) -> ModelOutput | None:
        """What `get_image_features` returned for these rows, in order; None if any is missing."""
        parts = []
        for key in image_keys:
            file = self._file(key)
            try:
                parts.append(load_file(file, device=str(device)))
            except FileNotFoundError:
                return None
            except (SafetensorError, OSError) as problem:
                reason = str(problem).splitlines()[0]
                ui.warn(f"'{file}' is not used and will be made anew: {reason}")
                return None
        return _join_features(parts)

    def put(self, image_keys: Sequence[str], tokens: Sequence[int], features: ModelOutput) -> None:
        """Keep the features of a batch. A full disk costs the reuse, not the run.

        Args:
            image_keys: of each row's images.
            tokens: image tokens of each row.
            features: what `get_image_features` returned for all of them.
        """
        parts = zip(image_keys, split_features(features, tokens), strict=True)
        for key, part in dict(parts).items():  # rows with the same images have the same features
            file = self._file(key)
            partial = file.with_suffix(f".{os.getpid()}.partial")
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                save_file(part, partial)
                partial.replace(file)
            except (SafetensorError, OSError) as problem:
                with contextlib.suppress(OSError):
                    partial.unlink()
                ui.warn(f"image features are not kept: cannot write '{file}': {problem}")
                return

    def _file(self, key: str) -> Path:
        return self.path / key[:2] / f"{key}.safetensors"

    def _name_old_folders(self) -> None:
        """Say which folders of earlier versions, by row number, are not used."""
        folders = self.path.parent.glob("*/[0-9][0-9][0-9][0-9][0-9]")
        old = sorted({folder.parent.name for folder in folders})
        if old:
            ui.say(
                "image features of an earlier version are not used, because they are by row; "
                f"delete them from '{self.path.parent}': {', '.join(old)}"
            )


def split_features(features: ModelOutput, tokens: Sequence[int]) -> list[dict[str, Tensor]]:
    """Cut a batch's features into rows, as named tensors.

    Args:
        features: with `pooler_output`, (N, I, H) or a sequence of one (I, H) per image, and perhaps
            `deepstack_features`, the same for each of some layers.
        tokens: image tokens of each row, in order.

    Returns:
        For each row its tensors by name. "#" in a name: one of a sequence.

    Raises ModelError for features that hold more than these, which would be lost (Ovis2).
    """
    others = set(features.keys()) - {_POOLED, _DEEPSTACK} - _NOT_READ
    if others:
        raise ModelError(
            f"--feature-cache: this family's image features hold {', '.join(sorted(others))} too, "
            "which is not kept; leave the option out"
        )
    rows: list[dict[str, Tensor]] = [{} for _ in tokens]
    parts = {_POOLED: features.pooler_output}
    layers = getattr(features, _DEEPSTACK, None) or []
    parts |= {f"{_DEEPSTACK}.{number:03d}": layer for number, layer in enumerate(layers)}
    for name, images in parts.items():
        next_image = 0
        for row, row_tokens in zip(rows, tokens, strict=True):
            first, taken = next_image, 0
            while taken < row_tokens:
                taken += images[next_image].shape[-2]
                next_image += 1
            of_row = images[first:next_image]
            if isinstance(images, Tensor):
                row[name] = of_row.contiguous().clone()
            else:
                row |= {f"{name}#{n:05d}": i.contiguous().clone() for n, i in enumerate(of_row)}
    return rows


def _join_features(rows: list[dict[str, Tensor]]) -> ModelOutput:
    """What `split_features` cut, as one output again."""
    parts_by_name: dict[str, list[Tensor]] = {}
    sequences: set[str] = set()
    for row in rows:
        for full_name, tensor in sorted(row.items()):
            name, mark, _ = full_name.partition("#")
            parts_by_name.setdefault(name, []).append(tensor)
            if mark:
                sequences.add(name)
    joined = ModelOutput()
    for name, parts in sorted(parts_by_name.items()):
        value: Any = tuple(parts) if name in sequences else torch.cat(parts)
        if name == _POOLED:
            joined[_POOLED] = value
        else:
            joined[_DEEPSTACK] = [*(joined.get(_DEEPSTACK) or []), value]
    return joined
