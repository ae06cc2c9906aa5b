"""Where a benchmark's images come from: a folder, or a drawing of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlmdpo import ui
from vlmdpo.data.images import BadImage, decode, inside, read, upright_rgb
from vlmdpo.errors import DataError


@dataclass(frozen=True)
class ImageFolder:
    """Images by name, which stay inside `path`.

    Attributes:
        of: whose images they are, in messages: "AMBER".
    """

    path: Path
    of: str

    def __str__(self) -> str:
        return f"'{self.path}'"

    def open(self, name: str) -> Image.Image:
        """The upright RGB image. Raises DataError."""
        try:
            return upright_rgb(decode(read(name, self.path)))
        except BadImage as problem:
            raise DataError(f"image '{self.path / name}' cannot be read: {problem}") from problem

    def missing(self, names: Sequence[str]) -> list[str]:
        """The names of missing images. Raises DataError if all of them, or the folder, are
        missing.
        """
        if not self.path.is_dir():
            raise DataError(
                f"folder '{self.path}' of {self.of}'s images does not exist; name it with "
                "--images DIR"
            )
        missing = [name for name in names if not self._has(name)]
        if names and len(missing) == len(names):
            raise DataError(
                f"'{self.path}' lacks all of {ui.count(len(missing), 'image')} ({missing[0]} "
                "...); name their folder with --images DIR"
            )
        return missing

    def _has(self, name: str) -> bool:
        try:
            return inside(self.path, name).is_file()
        except BadImage as problem:
            if problem.reason == "missing_image":  # its links form a circle
                return False
            raise DataError(f"image '{name}': {problem}") from problem


@dataclass(frozen=True)
class DrawnImages:
    """Images that are drawn by their names, so that none is ever missing."""

    draw: Callable[[str], Image.Image]

    def __str__(self) -> str:
        return "the embedded images"

    def open(self, name: str) -> Image.Image:
        """The image."""
        return self.draw(name)

    def missing(self, names: Sequence[str]) -> list[str]:
        """None of them."""
        return []
