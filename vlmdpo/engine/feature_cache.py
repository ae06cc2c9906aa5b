"""Image features on disk, for vision towers that do not train: the tower then runs once per
picture, ever.

It pays where the tower's work is large beside its tokens (Idefics2) and pictures are seen again:
more epochs, more runs. One safetensors file a row, below the prepared data. This module knows
nothing of models.
"""

from __future__ import annotations

import contextlib
import hashlib
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

FOLDER = "image-features"
_PER_FOLDER = 1000
_POOLED, _DEEP = "pooler_output", "deepstack_features"


def tower_digest(parameters: Sequence[Tensor]) -> str:
    """SHA-256 over the bytes of all weights that image features are made of."""
    digest = hashlib.sha256()
    for tensor in parameters:
        plain = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{tensor.dtype}|{tuple(tensor.shape)}".encode())
        digest.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
    return digest.hexdigest()


class FeatureCache:
    """The image features of rows, by row number. A file that cannot be read is reported, not used,
    and made anew.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.path = folder / FOLDER / key

    def known(self) -> int:
        """How many rows have their features."""
        return sum(1 for _ in self.path.rglob("*.safetensors"))

    def get(self, rows: Sequence[int], device: torch.device) -> Any | None:
        """What `get_image_features` gave for the pictures of these rows, one after the other; None
        if any is missing.
        """
        found = []
        for row in rows:
            file = self._file(row)
            try:
                found.append(load_file(file, device=str(device)))
            except FileNotFoundError:
                return None
            except (SafetensorError, OSError) as problem:
                ui.warn(
                    f"'{file}' is not used and will be made anew: {str(problem).splitlines()[0]}"
                )
                return None
        return _join(found)

    def put(self, rows: Sequence[int], tokens: Sequence[int], features: Any) -> None:
        """Keep the features of a batch. `tokens`: each row's image tokens. A full disk costs the
        reuse, not the run.
        """
        for row, part in zip(rows, split(features, tokens), strict=True):
            file = self._file(row)
            partial = file.with_suffix(f".{os.getpid()}.partial")
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                save_file(part, partial)
                partial.replace(file)
            except (SafetensorError, OSError) as problem:
                with contextlib.suppress(OSError):
                    partial.unlink()
                ui.warn(
                    f"image features of row {row} are not kept: cannot write '{file}': {problem}"
                )
                return

    def _file(self, row: int) -> Path:
        return self.path / f"{row // _PER_FOLDER:05d}" / f"{row}.safetensors"


def split(features: Any, tokens: Sequence[int]) -> list[dict[str, Tensor]]:
    """Cut a batch's features into rows, as named tensors.

    Args:
        features: with `pooler_output`, (pictures, tokens, H) or a sequence of one (tokens, H) per
            picture, and perhaps `deepstack_features`, the same for each of some layers.
        tokens: image tokens of each row, in order.
    """
    rows: list[dict[str, Tensor]] = [{} for _ in tokens]
    parts = {_POOLED: features.pooler_output}
    parts |= {
        f"{_DEEP}.{n:03d}": layer for n, layer in enumerate(getattr(features, _DEEP, None) or [])
    }
    for name, pictures in parts.items():
        at = 0
        for row, wanted in zip(rows, tokens, strict=True):
            first, taken = at, 0
            while taken < wanted:
                taken += pictures[at].shape[-2]
                at += 1
            if isinstance(pictures, Tensor):
                row[name] = pictures[first:at].contiguous().clone()
            else:
                row |= {
                    f"{name}#{n:05d}": p.contiguous().clone()
                    for n, p in enumerate(pictures[first:at])
                }
    return rows


def _join(rows: list[dict[str, Tensor]]) -> Any:
    """What `split` cut, as one output again; "#" tells sequences from tensors."""
    whole: dict[str, Any] = {}
    for row in rows:
        for name, part in sorted(row.items()):
            whole.setdefault(name.split("#")[0], []).append((part, "#" in name))
    joined = ModelOutput()
    for name, found in sorted(whole.items()):
        parts = [part for part, _ in found]
        value: Any = tuple(parts) if found[0][1] else torch.cat(parts)
        if name == _POOLED:
            joined[_POOLED] = value
        else:
            joined[_DEEP] = [*(joined.get(_DEEP) or []), value]
    return joined
