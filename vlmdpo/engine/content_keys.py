"""Keys of what rows hold, by content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from PIL import Image


def image_key(images: Sequence[Image.Image]) -> str:
    """The digest of decoded images: mode, size and pixels; "" for none."""
    if not images:
        return ""
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{image.mode} {image.size} ".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()[:32]
