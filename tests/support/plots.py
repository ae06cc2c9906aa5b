"""A stand-in for drawing, which takes a second of every run."""

import struct
import zlib


def _chunk(kind, content):
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


# One grey pixel.
_BLANK = b"\x89PNG\r\n\x1a\n" + b"".join(
    _chunk(kind, content)
    for kind, content in (
        (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0\x80")),
        (b"IEND", b""),
    )
)


def blank_plot(figure, target, **options):
    """In place of `matplotlib.figure.Figure.savefig`: a PNG of one pixel."""
    if hasattr(target, "write"):
        target.write(_BLANK)
    else:
        target.write_bytes(_BLANK)
