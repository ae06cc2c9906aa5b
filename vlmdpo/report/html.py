"""What the pages share: one template loader that escapes all text, and images as part
of the page.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image as PillowImage

from vlmdpo.config.options import Options

_NOTHING = "none"
SIDE_PX = 320  # the longer side of an image on a page


def environment(filters: Mapping[str, Any] | None = None, *, escape: bool = True) -> Environment:
    """Templates of this package. Nothing undefined passes; with `escape` every text is
    HTML-escaped.
    """
    return _environment(tuple(sorted((filters or {}).items())), escape)


@functools.cache  # with its compiled templates: a run writes several pages from them
def _environment(filters: tuple[tuple[str, Any], ...], escape: bool) -> Environment:
    made = Environment(
        loader=PackageLoader("vlmdpo.report"),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= dict(filters)
    return made


class Settings(NamedTuple):
    """The settings of a run: those that differ from the defaults, with these, and the others."""

    changed: list[tuple[str, Any, Any]]
    usual: list[tuple[str, Any]]


def by_difference(settings: Mapping[str, Any], config: type[Options]) -> Settings:
    """A run's settings as a page shows them, empty ones left out.

    Args:
        config: the command's options, whose defaults they are compared with.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    found = Settings([], [])
    for name, value in settings.items():
        value, default = _plain(value), _plain(defaults.get(name))
        if name in defaults and value != default:
            found.changed.append((name, value, default))
        elif value != _NOTHING:
            found.usual.append((name, value))
    return found


def _plain(value: Any) -> Any:
    """A setting as a page shows it, whether it comes from a file or from an option's default."""
    if value is None or value == "" or value == [] or value == ():
        return _NOTHING
    return (
        list(value)
        if isinstance(value, tuple)
        else str(value)
        if isinstance(value, Path)
        else value
    )


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
