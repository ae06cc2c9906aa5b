"""What the pages share: one template loader that escapes all text, and images as part
of the page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image as PillowImage

SIDE_PX = 320  # the longer side of an image on a page


def environment(filters: Mapping[str, Any] | None = None, *, escape: bool = True) -> Environment:
    """Templates of this package. Nothing undefined passes; with `escape` every text is
    HTML-escaped.
    """
    loader = PackageLoader("vlmdpo.report")
    made = Environment(
        loader=loader,
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= dict(filters or {})
    return made


def evenly(entries: Sequence[Any], count: int) -> list[Any]:
    """`count` of the entries, evenly spaced over all of them."""
    return (
        [entries[i * len(entries) // count] for i in range(count)]
        if len(entries) > count
        else list(entries)
    )


def uri(data: bytes, kind: str) -> str:
    """An image file as a data URI; `kind` as in image/png."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def thumbnail(image: PillowImage.Image) -> str:
    """An image as a data URI: small ones lossless, others reduced to JPEG."""
    kind = "PNG" if max(image.size) <= SIDE_PX else "JPEG"
    small = image.copy()
    small.thumbnail((SIDE_PX, SIDE_PX))
    buffer = io.BytesIO()
    small.convert("RGB").save(buffer, kind)
    return uri(buffer.getvalue(), kind.lower())
