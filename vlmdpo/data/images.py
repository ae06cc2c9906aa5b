"""Open, check, bound and store one picture. Knows nothing of datasets or models."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 120_000_000  # a decompression bomb is refused before it is decoded
_EXIF_ORIENTATION = 0x0112


class BadImage(Exception):
    """Why a picture cannot be used: `reason` is the counted name, the text says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def inside(root: Path, relative: str) -> Path:
    """The file that a path from data names, which must lie in `root`; raises BadImage where it points elsewhere."""
    path = (root / relative).resolve()
    if not path.is_relative_to(root.resolve()):
        raise BadImage("image_outside_root", f"'{relative}' points outside '{root}'")
    return path


def read(value: Any, root: Path) -> bytes:
    """The encoded bytes behind an image cell: bytes, {"bytes", "path"}, a path below `root`, or a PIL image."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None or value == "":
        raise BadImage("missing_image", "the row has no image")
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, Image.Image):
        return encode(value, "PNG")
    if not isinstance(value, str):
        raise BadImage("unreadable_image", f"an image cell holds {type(value).__name__}, not bytes, a path or a picture")
    path = inside(root, value)
    try:
        return path.read_bytes()
    except OSError as problem:
        raise BadImage("missing_image", f"cannot read '{path}': {problem.strerror}") from problem


def bound(data: bytes, max_side: int | None) -> bytes:
    """Bytes of a whole, upright RGB picture no longer than `max_side` pixels on any side.

    Bytes that already are one pass through untouched. Others are decoded (EXIF orientation applied), reduced with
    Lanczos, and written as JPEG where they came as JPEG, else as PNG.

    Raises:
        BadImage: "unreadable_image", "truncated_image" or "oversized_image".
    """
    picture = open_whole(data)
    kind = picture.format or "PNG"
    upright = picture.getexif().get(_EXIF_ORIENTATION, 1) == 1
    fits = max_side is None or max(picture.size) <= max_side
    if upright and fits and picture.mode == "RGB" and kind in ("JPEG", "PNG", "WEBP"):
        return data
    picture = to_rgb(ImageOps.exif_transpose(picture))
    if max_side is not None:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return encode(picture, "JPEG" if kind == "JPEG" else "PNG")


def open_whole(data: bytes) -> Image.Image:
    """A decoded picture; raises BadImage where the bytes are no picture, stop short, or would fill memory."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS below is the stricter bound
            picture = Image.open(io.BytesIO(data))
        if picture.width * picture.height > MAX_PIXELS:
            raise BadImage("oversized_image", f"{picture.width}x{picture.height} pixels, more than {MAX_PIXELS:,}")
        picture.load()
    except (UnidentifiedImageError, Image.DecompressionBombError) as problem:
        raise BadImage("unreadable_image", str(problem)) from problem
    except (OSError, SyntaxError, ValueError) as problem:  # what PIL's decoders raise on broken or short data
        raise BadImage("truncated_image", str(problem)) from problem
    return picture


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB, with transparent parts laid on white (a plain convert would turn them black or random)."""
    if picture.mode in ("RGBA", "LA", "PA") or (picture.mode == "P" and "transparency" in picture.info):
        layered = picture.convert("RGBA")
        paper = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(paper, layered).convert("RGB")
    return picture.convert("RGB")


def encode(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def open_file(path: Path) -> Image.Image:
    """An upright RGB picture from a file named by the user. Raises BadImage."""
    return to_rgb(ImageOps.exif_transpose(open_whole(read(path.name, path.parent))))
