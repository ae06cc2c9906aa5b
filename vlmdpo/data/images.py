"""Open, check and bound one image. All of vlmdpo opens images here, with `open_bytes`.

The bytes of an image that needs no change are kept; only their header and end are read. This module
knows nothing about datasets or models.
"""

from __future__ import annotations

import functools
import importlib
import io
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from vlmdpo.data.image_cells import inside, read, read_file
from vlmdpo.data.pixels import ALPHA_MODES, encode, resized, to_rgb
from vlmdpo.data.reasons import BadImage, foreign, shown

__all__ = [
    "BadImage",
    "EncodedImage",
    "bounded",
    "decode",
    "encode",
    "inside",
    "open_bytes",
    "open_file",
    "read",
    "to_rgb",
    "upright_rgb",
]

MAX_PIXELS = 120_000_000  # larger images are refused before they are decoded
# A progressive JPEG is decoded once for each of its scans, and a scan may have only a few bytes.
MAX_SCANNED_PIXELS = 2_000_000_000
_COMMON_SCANS = 64  # more than any encoder makes
# Pillow has many more; one of them, EPS, starts another program (Ghostscript).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_EXIF_ORIENTATION = 0x0112
_TURNED = range(2, 9)  # EXIF's orientations that are not upright
# Modes that every reader of the prepared data converts to RGB in the same way.
_PLAIN_MODES = ("RGB", "L")
_MODE_CHANGES = {
    "CMYK": "cmyk_to_rgb",
    "P": "palette_to_rgb",
    "PA": "palette_to_rgb",
    "I": "16bit_to_rgb",
}
# JPEG markers: frames that every decoder reads, and the start of the pixels.
_JPEG_BASELINE, _JPEG_SCAN = (0xC0, 0xC1, 0xC2), 0xDA
_SIGNATURES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"RIFF": "WebP"}
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")


@dataclass(frozen=True)
class EncodedImage:
    """An image ready to store: its bytes, (width, height) in pixels, and what was changed."""

    data: bytes
    size: tuple[int, int]
    changes: tuple[str, ...] = ()


def open_bytes(data: bytes) -> Image.Image:
    """An image whose header is read, of a format that is wanted. It is not decoded.

    Raises BadImage.
    """
    with warnings.catch_warnings(), foreign(BadImage, "truncated_image"):
        # MAX_PIXELS is the stricter bound.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data), formats=_formats())
        except UnidentifiedImageError:
            raise BadImage("unreadable_image", _what_it_is(data)) from None
        except Image.DecompressionBombError as problem:
            raise BadImage("oversized_image", str(problem)) from problem


@functools.cache
def _formats() -> tuple[str, ...]:
    """The wanted formats that this Pillow has; HEIC with the package pillow-heif."""
    Image.init()
    with suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in (*FORMATS, "AVIF", "HEIF") if name in Image.OPEN)


def _what_it_is(data: bytes) -> str:
    """Why bytes are no image, by how they begin."""
    if not data:
        return "no picture: there are no bytes"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        return "a HEIC picture, which needs another package: pip install pillow-heif"
    if data.startswith(b"version https://git-lfs"):
        return "no picture but a pointer of Git LFS; get the files with: git lfs pull"
    kind = next((name for start, name in _SIGNATURES.items() if data.startswith(start)), None)
    if kind:
        return f"a damaged {kind}: its header cannot be read"
    tag = re.match(rb"\s*(<[!?]?[\w-]{1,20}[^>]{0,40}>)", data[:80])
    if tag:
        return f"no picture: begins with {tag[1].decode('latin-1')}"
    return f"no picture: begins with {shown(data[:12])[1:]}"


def bounded(data: bytes, max_side: int | None) -> EncodedImage:
    """A complete, upright image of at most `max_side` pixels per side.

    Bytes of such an image are kept. Others are decoded (a JPEG at the smallest scale with enough
    pixels), rotated by their EXIF orientation, converted to RGB, reduced with the bicubic filter,
    and written as JPEG if they were JPEG, else as PNG. `changes` names each of these steps.

    Raises:
        BadImage: "unreadable_image", "truncated_image" or "oversized_image".
    """
    whole = _without_long_texts(data)
    image = _open(whole)
    size, kind = image.size, image.format or "PNG"
    changes = _changes(image, whole, max_side)
    if not changes and kind in ("JPEG", "PNG", "WEBP"):
        if not _is_complete(whole, kind):
            _load(image)  # raises for an incomplete image
        return EncodedImage(whole, size, () if whole is data else ("long_text_removed",))
    with foreign(BadImage, "truncated_image"):
        width, height = _bounded_size(size, max_side)
        image.draft(image.mode, (width, height))  # a no-op for all but JPEG
        _load(image)
        image = to_rgb(resized(image, (width, height)))
        if "exif_rotated" in changes:
            image = ImageOps.exif_transpose(image)
        target = "JPEG" if kind in ("JPEG", "MPO") else "PNG"
        if not changes:
            changes = [f"{kind.lower()}_to_{target.lower()}"]
        return EncodedImage(encode(image, target), image.size, tuple(changes))


def decode(data: bytes) -> Image.Image:
    """A decoded image. Raises BadImage if it is unreadable, incomplete or too large."""
    image = _open(_without_long_texts(data))
    _load(image)
    return image


def _open(data: bytes) -> Image.Image:
    """`open_bytes` of an image that may be decoded. Raises BadImage where that takes too much."""
    image = open_bytes(data)
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise BadImage(
            "oversized_image", f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,}"
        )
    scans = data.count(bytes((0xFF, _JPEG_SCAN))) if image.format in ("JPEG", "MPO") else 1
    if scans > _COMMON_SCANS and scans * pixels > MAX_SCANNED_PIXELS:
        raise BadImage(
            "oversized_image", f"{scans:,} scans of {image.width}x{image.height} pixels each"
        )
    return image


def _load(image: Image.Image) -> None:
    with foreign(BadImage, "truncated_image"):
        image.load()


def _changes(image: Image.Image, data: bytes, max_side: int | None) -> list[str]:
    """The names of the changes that an image needs; empty if it needs none."""
    changes = []
    kind, mode = image.format, image.mode
    if kind == "MPO":
        changes.append("first_of_several_pictures")
    elif _is_animated(image):
        changes.append("animated_first_frame")
    if mode.startswith("I;16"):
        changes.append("16bit_to_rgb")
    elif mode in _MODE_CHANGES:
        changes.append(_MODE_CHANGES[mode])
    elif mode not in _PLAIN_MODES and mode not in ALPHA_MODES:
        changes.append("mode_to_rgb")
    if mode in ALPHA_MODES or "transparency" in image.info:
        changes.append("alpha_on_white")
    # A PNG may hold EXIF after its pixels; asking Pillow for it would decode all of them.
    has_exif = (
        "exif" in image.info
        or (kind == "PNG" and b"eXIf" in data)
        or kind not in ("JPEG", "PNG", "WEBP", "MPO")
    )
    changes += _exif_changes(image) if has_exif else []
    if max_side is not None and max(image.size) > max_side:
        changes.append("resized")
    return changes


def _is_animated(image: Image.Image) -> bool:
    with foreign(BadImage, "truncated_image"):  # a GIF looks for its second frame
        return bool(getattr(image, "is_animated", False))


def _exif_changes(image: Image.Image) -> list[str]:
    """What an image's EXIF block asks for. One that cannot be read is removed, because the model's
    processor would stumble over it.
    """
    try:
        with foreign(BadImage, "malformed_exif"):
            exif = image.getexif()
            if "exif" in image.info:
                # Read afresh: Pillow has hidden an error of the first time, but would not hide it
                # from those who read a copy of the image, as processors do.
                exif = Image.Exif()
                exif.load(image.info["exif"])
            turned = exif.get(_EXIF_ORIENTATION, 1) in _TURNED
    except BadImage:
        image.info.pop("exif", None)
        return ["exif_removed"]
    return ["exif_rotated"] if turned else []


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of each chunk of a PNG."""
    at = 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at, end
        at = end


def _without_long_texts(data: bytes) -> bytes:
    """A PNG without its texts if Pillow refuses one of them for its length; else the same bytes."""
    if not data.startswith(b"\x89PNG") or not any(kind in data for kind in _PNG_TEXTS):
        return data
    texts = [chunk for chunk in _png_chunks(data) if chunk[0] in _PNG_TEXTS]
    lengths = [_text_length(kind, data[start + 8 : end - 4]) for kind, start, end in texts]
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    if not lengths or (max(lengths) <= limits[0] and sum(lengths) <= limits[1]):
        return data
    kept = [data[a:b] for kind, a, b in _png_chunks(data) if kind not in _PNG_TEXTS]
    return data[:8] + b"".join(kept)


def _text_length(kind: bytes, chunk: bytes) -> int:
    """The length of a PNG's text, decompressed as far as Pillow would."""
    _, _, rest = chunk.partition(b"\0")  # behind the keyword
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] != b"\1"):
        return len(chunk)
    packed = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
    with suppress(zlib.error):
        return len(zlib.decompressobj().decompress(packed, PngImagePlugin.MAX_TEXT_CHUNK + 1))
    return len(packed)


def _is_complete(data: bytes, kind: str) -> bool:
    """Whether the bytes end as their format does (for PNG, with valid checksums).

    False if only decoding can tell. Raises BadImage for a broken PNG.
    """
    if kind == "JPEG":
        return data.rstrip(b"\x00").endswith(b"\xff\xd9") and _is_common_jpeg(data)
    if kind == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 <= len(data)
    with foreign(BadImage, "truncated_image"):
        open_bytes(data).verify()
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


def open_file(path: Path) -> Image.Image:
    """An upright RGB image from a file that the user named; links are followed. Raises BadImage."""
    return upright_rgb(decode(read_file(path, f"'{path}'")))


def upright_rgb(image: Image.Image) -> Image.Image:
    """A decoded image as RGB, rotated by its EXIF orientation where that can be read.

    Raises BadImage.
    """
    turned = _exif_changes(image)
    with foreign(BadImage, "truncated_image"):
        return to_rgb(ImageOps.exif_transpose(image) if "exif_rotated" in turned else image)
