"""Images for tests of data: encoded bytes and photo-like noise."""

import functools
import io
import pickle

import numpy as np
from PIL import Image, PngImagePlugin


def encoded(size=(40, 30), mode="RGB", kind="PNG", color=None, **more):
    buffer = io.BytesIO()
    Image.new(mode, size, color if color is not None else (1 if mode == "P" else None)).save(
        buffer, format=kind, **more
    )
    return buffer.getvalue()


@functools.cache
def noise(size, seed=0, kind="JPEG", **more):
    """An image with detail at every scale, so that a wrong filter or a damaged byte shows."""
    rng = np.random.default_rng(seed)
    pixels = np.full((size[1], size[0], 3), 128.0)
    for cells in (3, 11, 47):
        coarse = Image.fromarray(rng.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
        pixels += (np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=float) - 128) / 2
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, format=kind, **more)
    return buffer.getvalue()


def sent(thing):
    """An object as another process receives it."""
    return pickle.loads(pickle.dumps(thing))  # noqa: S301 - our own bytes


def opened(data):
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


def malformed_exif():
    """A good JPEG with an EXIF block that Pillow cannot read."""
    data = encoded(kind="JPEG")
    block = b"Exif\0\0no TIFF header at all"
    return data[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + data[2:]


def png_with_long_text():
    """A good PNG with a compressed text of more than Pillow's one megabyte."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", "x" * 2_000_000, zip=True)
    return encoded(pnginfo=texts)
