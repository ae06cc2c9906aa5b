"""From a cell of data to the encoded bytes of its image: bytes, paths, data: URIs, base64.

Nothing is decoded here; sizes are looked at before anything is read.
"""

from __future__ import annotations

import base64
import binascii
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlmdpo.data.pixels import encode
from vlmdpo.data.reasons import BadImage, foreign, missing, shown

MAX_BYTES = 256_000_000  # of an encoded image
# How base64 of JPEG, PNG, GIF and WebP begins; no path is that long without a dot.
_BARE_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/=\s]{64}")
# Where objects have an image: `datasets` and pandas, OpenAI and Qwen, ms-swift.
_KEYS = ("bytes", "path", "url", "image_url", "image")


def inside(root: Path, relative: str, allowed: Sequence[Path] = ()) -> Path:
    """The file that a path in data names; symbolic links are followed.

    Raises BadImage if it lies outside `root` and the folders of `allowed`, or if it is no path.
    """
    try:
        path = (root / relative).resolve()
        roots = [folder.resolve() for folder in (root, *allowed)]
    except (OSError, RuntimeError, ValueError) as problem:  # NUL, half a character, circular links
        why = "its links form a circle" if isinstance(problem, RuntimeError) else str(problem)
        raise BadImage("missing_image", f"{shown(relative)} is not a usable path: {why}") from None
    if not any(path.is_relative_to(folder) for folder in roots):
        raise BadImage("image_outside_root", f"{shown(relative)} points outside '{root}'")
    return path


def read(value: Any, root: Path, allowed: Sequence[Path] = ()) -> bytes:
    """The encoded bytes of an image cell.

    A cell is bytes, a path below `root` or a folder of `allowed`, a data: URI, base64, a PIL image,
    or an object with one of these, such as {"bytes", "path"}. Raises BadImage.
    """
    if isinstance(value, dict):
        return read(_of_object(value), root, allowed)
    if missing(value) or value == "":
        raise BadImage("missing_image", "the row has no image")
    if isinstance(value, (bytes, bytearray)):
        return _bounded_size(bytes(value))
    if isinstance(value, Image.Image):
        with foreign(BadImage, "unreadable_image"):
            return encode(value, "PNG")
    if not isinstance(value, str):
        raise BadImage(
            "unreadable_image",
            f"an image cell holds {type(value).__name__}, not bytes, a path or an image",
        )
    if value.startswith("data:"):
        return _from_base64(value.partition(",")[2], "a data: URI")
    if _BARE_BASE64.match(value):
        return _from_base64(value, "a cell of base64")
    if "://" in value:
        raise BadImage(
            "image_is_url", f"{shown(value)} is not fetched; download images and name their files"
        )
    return read_file(inside(root, value, allowed), shown(value))


def _of_object(value: dict[str, Any]) -> Any:
    """What an object says of its image. Raises BadImage for an object of another kind."""
    held = next((value[key] for key in _KEYS if not missing(value.get(key) or None)), None)
    if held is None and any(value.values()):
        names = ", ".join(shown(key) for key in list(value)[:5])
        raise BadImage("unreadable_image", f"an image cell is an object with {names}")
    return held


def read_file(path: Path, name: str) -> bytes:
    """The bytes of an image file, which messages call `name`. Raises BadImage."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # reading a FIFO waits forever, a device never ends
            raise BadImage("missing_image", f"{name} is not a file")
        _check_size(about.st_size, name)
        with path.open("rb") as file:
            return file.read(MAX_BYTES)
    except (OSError, ValueError) as problem:
        why = getattr(problem, "strerror", None) or str(problem)
        raise BadImage("missing_image", f"cannot read {name}: {why}") from problem


def _check_size(size: int, name: str) -> None:
    if size > MAX_BYTES:
        raise BadImage(
            "oversized_image",
            f"{name} has {size / 1e6:,.0f} MB, more than {MAX_BYTES / 1e6:,.0f} MB",
        )


def _bounded_size(data: bytes) -> bytes:
    _check_size(len(data), "an image cell")
    return data


def _from_base64(text: str, name: str) -> bytes:
    _check_size(len(text) * 3 // 4, name)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as problem:
        raise BadImage("unreadable_image", f"{name} is not valid base64: {problem}") from problem


def image_cells(images: Any) -> list[Any]:
    """The cells of a row's images as one list; empty where the row names none.

    A gap in a list is kept: the row names an image there.
    """
    if isinstance(images, (list, tuple)):
        return [cell for one in images for cell in _of_list(one)]
    return [] if is_empty(images) else [images]


def _of_list(one: Any) -> Iterable[Any]:
    return image_cells(one) if isinstance(one, (list, tuple)) else [None if is_empty(one) else one]


def is_empty(cell: Any) -> bool:
    """Whether a cell names no image: nothing, or an object of nothing."""
    return missing(cell) or (isinstance(cell, dict) and all(map(missing, cell.values())))
