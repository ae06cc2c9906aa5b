"""Open, check, reduce and encode one image.

The bytes of an image that needs no change are kept; only their header and end are read. This module
knows nothing about datasets or models.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 120_000_000  # larger images are refused before they are decoded
_EXIF_ORIENTATION = 0x0112
# Modes that every reader of the prepared data converts to RGB in the same way.
_PLAIN_MODES = ("RGB", "L")
_MODE_CHANGES = {
    "CMYK": "cmyk_to_rgb",
    "P": "palette_to_rgb",
    "PA": "palette_to_rgb",
    "I": "16bit_to_rgb",
}
# What Pillow raises for broken or truncated data.
_BROKEN_DATA = (OSError, SyntaxError, ValueError)
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
# JPEG markers: frames that every decoder reads, and the start of the pixels.
_JPEG_BASELINE, _JPEG_SCAN = (0xC0, 0xC1, 0xC2), 0xDA


class BadImage(Exception):
    """Why an image cannot be used: `reason` is the name it is counted by, the text says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class EncodedImage:
    """An image ready to store: its bytes, (width, height) in pixels, and what was changed."""

    data: bytes
    size: tuple[int, int]
    changes: tuple[str, ...] = ()


def inside(root: Path, relative: str) -> Path:
    """The file that a path in data names. Raises BadImage if it lies outside `root`."""
    try:
        path = (root / relative).resolve()
    except (ValueError, OSError, RuntimeError) as problem:
        # A NUL, half a surrogate pair, or links in a circle (RuntimeError before Python 3.13).
        raise BadImage("missing_image", f"{relative[:80]!r} names no file: {problem}") from problem
    if not path.is_relative_to(root.resolve()):
        raise BadImage("image_outside_root", f"'{relative}' points outside '{root}'")
    return path


def read(value: Any, root: Path) -> bytes:
    """The encoded bytes of an image cell.

    A cell is bytes, {"bytes", "path"}, a path below `root`, a data: URI or a PIL image. Raises
    BadImage.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None or value == "":
        raise BadImage("missing_image", "the row has no image")
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, Image.Image):
        return encode(value, "PNG")
    if not isinstance(value, str):
        raise BadImage(
            "unreadable_image",
            f"an image cell holds {type(value).__name__}, not bytes, a path or an image",
        )
    if "://" in value:
        raise BadImage(
            "image_is_url",
            f"'{value[:80]}' is not fetched; download images first and name their files",
        )
    if value.startswith("data:image/"):
        return _from_uri(value)
    path = inside(root, value)
    try:
        return path.read_bytes()
    except OSError as problem:
        raise BadImage("missing_image", f"cannot read '{path}': {problem.strerror}") from problem


def _from_uri(value: str) -> bytes:
    try:
        return base64.b64decode(value.partition(",")[2], validate=True)
    except binascii.Error as problem:
        raise BadImage(
            "unreadable_image", f"a data: URI is not valid base64: {problem}"
        ) from problem


def bounded(data: bytes, max_side: int | None) -> EncodedImage:
    """A complete, upright image of at most `max_side` pixels per side.

    Bytes of such an image are kept. Others are decoded (a JPEG at the smallest scale with enough
    pixels), rotated by their EXIF orientation, converted to RGB, reduced with the bicubic filter,
    and written as JPEG if they were JPEG, else as PNG. `changes` names each of these steps.

    Raises:
        BadImage: "unreadable_image", "truncated_image" or "oversized_image".
    """
    image = _open(data)
    size, kind = image.size, image.format or "PNG"
    changes = _changes(image, data, max_side)
    if not changes and kind in ("JPEG", "PNG", "WEBP"):
        if not _is_complete(data, kind):
            _load(image)  # raises for an incomplete image
        return EncodedImage(data, size)
    width, height = _bounded_size(size, max_side)
    image.draft(image.mode, (width, height))  # a no-op for all but JPEG
    _load(image)
    image = to_rgb(_resized(image, (width, height)))
    if "exif_rotated" in changes:
        image = ImageOps.exif_transpose(image)
    target = "JPEG" if kind in ("JPEG", "MPO") else "PNG"
    if not changes:
        changes = [f"{kind.lower()}_to_{target.lower()}"]
    return EncodedImage(encode(image, target), image.size, tuple(changes))


def decode(data: bytes) -> Image.Image:
    """A decoded image. Raises BadImage if it is unreadable, incomplete or too large."""
    image = _open(data)
    _load(image)
    return image


def _open(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # MAX_PIXELS below is the stricter bound.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
    except (UnidentifiedImageError, Image.DecompressionBombError) as problem:
        bomb = isinstance(problem, Image.DecompressionBombError)
        raise BadImage("oversized_image" if bomb else "unreadable_image", str(problem)) from problem
    except _BROKEN_DATA as problem:
        raise BadImage("truncated_image", str(problem)) from problem
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(
            "oversized_image", f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,}"
        )
    return image


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except _BROKEN_DATA as problem:
        raise BadImage("truncated_image", str(problem)) from problem


def _changes(image: Image.Image, data: bytes, max_side: int | None) -> list[str]:
    """The names of the changes that an image needs; empty if it needs none."""
    changes = []
    kind, mode = image.format, image.mode
    if kind == "MPO":
        changes.append("first_of_several_pictures")
    elif getattr(image, "is_animated", False):
        changes.append("animated_first_frame")
    if mode.startswith("I;16"):
        changes.append("16bit_to_rgb")
    elif mode in _MODE_CHANGES:
        changes.append(_MODE_CHANGES[mode])
    elif mode not in _PLAIN_MODES and mode not in _ALPHA:
        changes.append("mode_to_rgb")
    if mode in _ALPHA or "transparency" in image.info:
        changes.append("alpha_on_white")
    # A PNG may hold EXIF after its pixels; asking Pillow for it would decode all of them.
    has_exif = (
        "exif" in image.info
        or (kind == "PNG" and b"eXIf" in data)
        or kind not in ("JPEG", "PNG", "WEBP", "MPO")
    )
    if has_exif and image.getexif().get(_EXIF_ORIENTATION, 1) not in (0, 1):
        changes.append("exif_rotated")
    if max_side is not None and max(image.size) > max_side:
        changes.append("resized")
    return changes


def _is_complete(data: bytes, kind: str) -> bool:
    """Whether the bytes end as their format does (for PNG, with valid checksums).

    False if only decoding can tell. Raises BadImage for a broken PNG.
    """
    if kind == "JPEG":
        return data.rstrip(b"\x00").endswith(b"\xff\xd9") and _is_common_jpeg(data)
    if kind == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 <= len(data)
    try:
        Image.open(io.BytesIO(data)).verify()
    except _BROKEN_DATA as problem:
        raise BadImage("truncated_image", str(problem)) from problem
    return data.rstrip(b"\x00").endswith(b"IEND\xaeB`\x82")


def _is_common_jpeg(data: bytes) -> bool:
    """Whether a JPEG is baseline or progressive. Pillow opens rarer kinds (lossless, arithmetic)
    but may fail to decode them.
    """
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _JPEG_BASELINE:
            return True
        if marker == _JPEG_SCAN:
            return False
        # FF may be repeated as padding.
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _bounded_size(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    if max_side is None or max(size) <= max_side:
        return size
    scale = max_side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Reduced with Pillow's bicubic filter, by PyTorch's kernel for it: equal to one level, and 2.5
    times as fast.
    """
    if image.size == size:
        return image
    if image.mode != "RGB":
        image = to_rgb(image)  # palette indices cannot be averaged
    import numpy
    import torch

    pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1)[None]
    reduced = torch.nn.functional.interpolate(
        pixels, size=(size[1], size[0]), mode="bicubic", antialias=True
    )
    resized = Image.fromarray(reduced[0].permute(1, 2, 0).numpy())
    resized.info = image.info
    return resized


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with transparency on white and 16 bits scaled to 8 (Pillow's convert makes transparent
    parts black, and clips 16 bits).
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _ALPHA or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        rgb = Image.alpha_composite(white, layered).convert("RGB")
    elif image.mode == "I" or image.mode.startswith("I;16"):
        rgb = image.convert("I").point(lambda level: level * (1 / 256)).convert("L").convert("RGB")
    else:
        rgb = image.convert("RGB")
    for name in ("exif", "Raw profile type exif", "xmp"):
        if name in image.info:
            rgb.info[name] = image.info[name]
    return rgb


def encode(image: Image.Image, kind: str) -> bytes:
    """The bytes of an image in a format, without its metadata."""
    buffer = io.BytesIO()
    image.info = {}
    image.save(buffer, format=kind, **({"quality": 90} if kind == "JPEG" else {}))
    return buffer.getvalue()


def open_file(path: Path) -> Image.Image:
    """An upright RGB image from a file that the user named. Raises BadImage."""
    return upright_rgb(read(path.name, path.parent))


def upright_rgb(data: bytes) -> Image.Image:
    """A decoded RGB image, rotated by its EXIF orientation where that can be read, without
    metadata: processors would read EXIF again, and fail where it is malformed. Raises BadImage.
    """
    image = decode(data)
    with contextlib.suppress(*_BROKEN_DATA, struct.error):
        image = ImageOps.exif_transpose(image)
    image = to_rgb(image)
    image.info = {}
    return image
