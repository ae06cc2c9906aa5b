"""Weights on disk, without loading them: where they lie, what is wrong with a file, and whether two
folders hold the same ones.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.models import registry

_LFS_POINTER = b"version https://git-lfs"
# Files of a model that hold one JSON object, and what that must have.
_OBJECTS = {
    "tokenizer.json": ("model",),
    **dict.fromkeys(("config.json", "generation_config.json", "tokenizer_config.json"), ()),
    **dict.fromkeys(("processor_config.json", "preprocessor_config.json"), ()),
}
_MAX_HEADER_BYTES = 100_000_000  # of safetensors itself
_SAMPLED = 64  # values of each tensor that are compared: training changes them


def local_folder(model: str, revision: str | None = None) -> Path | None:
    """The folder that holds a model's files: its own, or one in the Hub's cache; None if absent."""
    if model == "tiny":
        return Path(str(resources.files("vlmdpo").joinpath("tiny", "assets", "model")))
    folder = Path(registry.hub_id(model))
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(registry.hub_id(model), "config.json", revision=revision)
    except HFValidationError:  # a path that no longer exists
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def damaged_file(folder: Path) -> str | None:
    """Which file of a model's or adapter's folder is damaged, and how; None if none is seen to be.

    Looks at the sizes that safetensors promise, and for pointers that git LFS left in place of any
    file.
    """
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        reason = damage(path)
        if reason is not None:
            return f"'{path.name}' {reason}"
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a file, as the end of a sentence with the next step."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        return "is a pointer of git LFS in place of the file; fetch it with: git lfs pull"
    if path.name in _OBJECTS:
        return _not_an_object(path)
    if path.suffix != ".safetensors":
        return None
    if size == 0:
        return "is empty; get it again"
    tensors = _header(path)
    if tensors is None:
        return "is damaged; get it again"
    header_bytes, entries = tensors
    promised = 8 + header_bytes + max((entry["data_offsets"][1] for entry in entries), default=0)
    if size < promised:
        return (
            f"is cut off after {ui.human_bytes(size)} of {ui.human_bytes(promised)}; get it again"
        )
    return None


def _not_an_object(path: Path) -> str | None:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        return f"is not valid JSON ({problem}); get it again"
    except RecursionError:
        return "is nested too deeply; get it again"
    if not isinstance(held, dict) or any(key not in held for key in _OBJECTS[path.name]):
        return "does not hold what a file of this name holds; get it again"
    return None


def _header(path: Path) -> tuple[int, list[dict[str, Any]]] | None:
    """(bytes of a safetensors header, its tensors); None if it is none."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
            return None
        try:
            header = json.loads(file.read(header_bytes))
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            if all(len(entry["data_offsets"]) == 2 for entry in entries):
                return header_bytes, entries
        except (ValueError, AttributeError, TypeError, KeyError):  # not JSON, or another form
            pass
    return None


def same_weights(one: Path, other: Path) -> bool | None:
    """Whether two folders hold the same weights, by the first values of each; None if one of them
    holds none that can be read.

    Names and files do not count, nor weights that are stored twice, nor the data type: values are
    compared as bfloat16.
    """
    samples = [_samples(folder) for folder in (one, other)]
    return samples[0] == samples[1] if all(samples) else None


def _samples(folder: Path) -> set[tuple[Any, ...]]:
    import torch

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found: set[tuple[Any, ...]] = set()
    for path in folder.glob("model*.safetensors"):
        tensors = _header(path)
        if tensors is None:
            return set()
        header_bytes, entries = tensors
        with path.open("rb") as file:
            for entry in entries:
                dtype = dtypes.get(str(entry.get("dtype")))
                start, end = entry["data_offsets"]
                if dtype is None or end <= start:
                    continue
                file.seek(8 + header_bytes + start)
                data = bytearray(file.read(min(end - start, _SAMPLED * dtype.itemsize)))
                if len(data) % dtype.itemsize or not data:  # cut off
                    return set()
                values = torch.frombuffer(data, dtype=dtype).bfloat16()
                found.add((*entry["shape"], values.view(torch.int16).numpy().tobytes()))
    return found
