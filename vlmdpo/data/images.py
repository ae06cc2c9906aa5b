"""Open, check, bound and store one picture. Knows nothing of datasets or models.

A picture that is fine as it is passes through as the bytes it came in: only its header and its end
are read.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 120_000_000  # a decompression bomb is refused before it is decoded
_EXIF_ORIENTATION = 0x0112
_PLAIN_MODES = (
    "RGB",
    "L",
)  # what every reader of the prepared data turns into RGB without a choice to make
_MODE_CHANGES = {
    "CMYK": "cmyk_to_rgb",
    "P": "palette_to_rgb",
    "PA": "palette_to_rgb",
    "I": "16bit_to_rgb",
}
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_JPEG_BASELINE, _JPEG_SCAN = (
    (0xC0, 0xC1, 0xC2),
    0xDA,
)  # frame markers that every decoder reads; start of the pixels


class BadImage(Exception):
    """Why a picture cannot be used: `reason` is the counted name, the text says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Picture:
    """A picture ready to store: encoded bytes, (width, height) in pixels, and the names of what was
    changed.
    """

    data: bytes
    size: tuple[int, int]
    changes: tuple[str, ...] = ()


def inside(root: Path, relative: str) -> Path:
    """The file that a path from data names, which must lie in `root`; raises BadImage where it
    points elsewhere.
    """
    path = (root / relative).resolve()
    if not path.is_relative_to(root.resolve()):
        raise BadImage("image_outside_root", f"'{relative}' points outside '{root}'")
    return path


def read(value: Any, root: Path) -> bytes:
    """The encoded bytes behind an image cell: bytes, {"bytes", "path"}, a path below `root`, a
    data: URI, a PIL image.
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
            f"an image cell holds {type(value).__name__}, not bytes, a path or a picture",
        )
    if "://" in value:
        raise BadImage(
            "image_is_url",
            f"'{value[:80]}' is not fetched; download pictures first and name their files",
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
        raise BadImage("unreadable_image", f"a data: URI is no base64: {problem}") from problem


def bound(data: bytes, max_side: int | None) -> Picture:
    """A whole, upright picture no longer than `max_side` pixels on any side.

    Bytes that already are one pass through untouched. Others are decoded (JPEG at the smallest
    scale that holds enough pixels), turned upright by their EXIF orientation, put into RGB, reduced
    with the bicubic filter, and written as JPEG where they came as JPEG, else as PNG. `changes`
    names each of these.

    Raises:
        BadImage: "unreadable_image", "truncated_image" or "oversized_image".
    """
    picture = _open(data)
    size, kind = picture.size, picture.format or "PNG"
    changes = _changes(picture, data, max_side)
    if not changes and kind in ("JPEG", "PNG", "WEBP"):
        if not _is_whole(data, kind):
            _load(picture)  # its end does not tell: decoding does
        return Picture(data, size)
    width, height = _bounded(size, max_side)
    picture.draft(picture.mode, (width, height))  # a no-op for all but JPEG
    _load(picture)
    picture = to_rgb(_resized(picture, (width, height)))
    if "exif_rotated" in changes:
        picture = ImageOps.exif_transpose(picture)
    kept = "JPEG" if kind in ("JPEG", "MPO") else "PNG"
    if not changes:
        changes = [f"{kind.lower()}_to_{kept.lower()}"]
    return Picture(encode(picture, kept), picture.size, tuple(changes))


def open_whole(data: bytes) -> Image.Image:
    """A decoded picture; raises BadImage where the bytes are no picture, stop short, or would fill
    memory.
    """
    picture = _open(data)
    _load(picture)
    return picture


def _open(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # MAX_PIXELS below is the stricter bound
            picture = Image.open(io.BytesIO(data))
    except (UnidentifiedImageError, Image.DecompressionBombError) as problem:
        bomb = isinstance(problem, Image.DecompressionBombError)
        raise BadImage("oversized_image" if bomb else "unreadable_image", str(problem)) from problem
    except (
        OSError,
        SyntaxError,
        ValueError,
    ) as problem:  # what PIL's readers raise on broken or short headers
        raise BadImage("truncated_image", str(problem)) from problem
    if picture.width * picture.height > MAX_PIXELS:
        raise BadImage(
            "oversized_image", f"{picture.width}x{picture.height} pixels, more than {MAX_PIXELS:,}"
        )
    return picture


def _load(picture: Image.Image) -> None:
    try:
        picture.load()
    except (
        OSError,
        SyntaxError,
        ValueError,
    ) as problem:  # what PIL's decoders raise on broken or short data
        raise BadImage("truncated_image", str(problem)) from problem


def _changes(picture: Image.Image, data: bytes, max_side: int | None) -> list[str]:
    """What has to be done to a picture, by name; empty for one that is fine."""
    found = []
    kind, mode = picture.format, picture.mode
    if kind == "MPO":
        found.append("first_of_several_pictures")
    elif getattr(picture, "is_animated", False):
        found.append("animated_first_frame")
    if mode.startswith("I;16"):
        found.append("16bit_to_rgb")
    elif mode in _MODE_CHANGES:
        found.append(_MODE_CHANGES[mode])
    elif mode not in _PLAIN_MODES and mode not in _ALPHA:
        found.append("mode_to_rgb")
    if mode in _ALPHA or "transparency" in picture.info:
        found.append("alpha_on_white")
    # A PNG may hold its EXIF behind the pixels, where asking PIL for it would decode them all.
    has_exif = (
        "exif" in picture.info
        or (kind == "PNG" and b"eXIf" in data)
        or kind not in ("JPEG", "PNG", "WEBP", "MPO")
    )
    if has_exif and picture.getexif().get(_EXIF_ORIENTATION, 1) not in (0, 1):
        found.append("exif_rotated")
    if max_side is not None and max(picture.size) > max_side:
        found.append("resized")
    return found


def _is_whole(data: bytes, kind: str) -> bool:
    """Whether the bytes end as their format does (and, for PNG, every checksum holds); False where
    only decoding tells.
    """
    if kind == "JPEG":
        return data.rstrip(b"\x00").endswith(b"\xff\xd9") and _common_jpeg(data)
    if kind == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 <= len(data)
    try:
        Image.open(io.BytesIO(data)).verify()
    except (OSError, SyntaxError, ValueError) as problem:
        raise BadImage("truncated_image", str(problem)) from problem
    return data.rstrip(b"\x00").endswith(b"IEND\xaeB`\x82")


def _common_jpeg(data: bytes) -> bool:
    """Whether the frame is baseline or progressive: PIL opens rarer kinds (lossless, arithmetic)
    and may fail later.
    """
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _JPEG_BASELINE:
            return True
        if marker == _JPEG_SCAN:
            return False
        at += (
            1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        )  # FF may be repeated as filling
    return False


def _bounded(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    if max_side is None or max(size) <= max_side:
        return size
    scale = max_side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Reduced with Pillow's bicubic filter; for RGB by PyTorch's kernel of it, equal to one level
    and 2.5 times as fast.
    """
    if picture.size == size:
        return picture
    if picture.mode != "RGB":
        picture = to_rgb(picture)  # before, since palette indices and two alphas cannot be averaged
    import numpy
    import torch

    pixels = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)[None]
    reduced = torch.nn.functional.interpolate(
        pixels, size=(size[1], size[0]), mode="bicubic", antialias=True
    )
    made = Image.fromarray(reduced[0].permute(1, 2, 0).numpy())
    made.info = picture.info
    return made


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB, with transparent parts laid on white and 16 bits scaled to 8 (a plain convert turns them
    black, or clips).
    """
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode in _ALPHA or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        paper = Image.new("RGBA", layered.size, "white")
        made = Image.alpha_composite(paper, layered).convert("RGB")
    elif picture.mode == "I" or picture.mode.startswith("I;16"):
        made = (
            picture.convert("I").point(lambda level: level * (1 / 256)).convert("L").convert("RGB")
        )
    else:
        made = picture.convert("RGB")
    for name in ("exif", "Raw profile type exif", "xmp"):
        if name in picture.info:
            made.info[name] = picture.info[name]
    return made


def encode(picture: Image.Image, kind: str) -> bytes:
    """The bytes of a picture in a format, without the metadata that it came with."""
    buffer = io.BytesIO()
    picture.info = {}
    picture.save(buffer, format=kind, **({"quality": 90} if kind == "JPEG" else {}))
    return buffer.getvalue()


def open_file(path: Path) -> Image.Image:
    """An upright RGB picture from a file named by the user. Raises BadImage."""
    return to_rgb(ImageOps.exif_transpose(open_whole(read(path.name, path.parent))))
