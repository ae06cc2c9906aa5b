"""Which rows of a dataset have the same images, the same prompt and the same answers.

`prepare` writes a digest of each row's images and of its prompt. Other datasets, such as TRL's own,
are read through once, without decoding an image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.data.pairs import SIDES
from vlmdpo.data.sources import as_stored

IMAGE_DIGEST, PROMPT_DIGEST = "image_digest", "prompt_digest"  # the columns that prepare writes
NO_IMAGES = -1
_BETWEEN_IMAGES = "-"


@dataclass(frozen=True)
class RowGroups:
    """What the rows of a dataset share, one entry per row.

    Attributes:
        images: equal for rows with the same images in the same order; NO_IMAGES for rows without.
        prompts: equal for rows with the same prompt about the same images.
    """

    images: list[int]
    prompts: list[int]

    @property
    def num_images(self) -> int:
        """How many different images, or combinations of images, the rows have."""
        return len(set(self.images) - {NO_IMAGES})

    @property
    def num_prompts(self) -> int:
        return len(set(self.prompts))

    def together(self, row: int) -> tuple[int, int]:
        """Equal for rows that train together: those with the same images or, without images, with
        the same prompt.
        """
        image = self.images[row]
        return (image, NO_IMAGES) if image != NO_IMAGES else (NO_IMAGES, self.prompts[row])

    @property
    def is_shared(self) -> bool:
        """Whether any two rows have the same images, or the same prompt."""
        with_images = [image for image in self.images if image != NO_IMAGES]
        return len(set(with_images)) < len(with_images) or self.num_prompts < len(self.prompts)


def image_digest(images: Iterable[bytes]) -> str:
    """The digest of a row's encoded images: 16 hex digits for each, in order; "" for none."""
    return _BETWEEN_IMAGES.join(hashlib.sha256(image).hexdigest()[:16] for image in images)


def prompt_digest(prompt: Any, images: str) -> str:
    """The digest of a prompt about its images, 16 hex digits.

    Args:
        prompt: messages, or a text.
        images: their `image_digest`.
    """
    text = json.dumps([images, prompt], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def row_groups(dataset: Any) -> RowGroups:
    """What the rows of a `datasets.Dataset` share."""
    digests = list(_digests(dataset))
    image_numbers = _numbers(images for images, _ in digests)
    prompts = _numbers(prompt for _, prompt in digests)
    images = [
        number if digest else NO_IMAGES
        for number, (digest, _) in zip(image_numbers, digests, strict=True)
    ]
    return RowGroups(images, prompts)


def answer_numbers(dataset: Any, groups: RowGroups) -> list[tuple[int, int]]:
    """(chosen, rejected) of each row: equal numbers for equal answers to the same prompt."""
    answers = (
        hashlib.sha256(json.dumps([prompt, row[side]], sort_keys=True).encode()).digest()[:8]
        for prompt, row in zip(
            groups.prompts, as_stored(dataset.select_columns(list(SIDES))), strict=True
        )
        for side in SIDES
    )
    numbers = _numbers(answers)
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def count_distinct(datasets: Sequence[Any]) -> dict[str, float]:
    """How many different images and prompts the rows of all these datasets have, and how many rows
    there are for each prompt.
    """
    images: set[str] = set()
    prompts: set[str] = set()
    rows = 0
    for dataset in datasets:
        for image, prompt in _digests(dataset):
            images.update(image.split(_BETWEEN_IMAGES) if image else ())
            prompts.add(prompt)
            rows += 1
    return {
        "images": len(images),
        "prompts": len(prompts),
        "pairs_per_prompt": rows / max(1, len(prompts)),
    }


def _digests(dataset: Any) -> Iterator[tuple[str, str]]:
    """(digest of the images, digest of the prompt) of each row."""
    if {IMAGE_DIGEST, PROMPT_DIGEST} <= set(dataset.column_names):
        yield from zip(dataset[IMAGE_DIGEST][:], dataset[PROMPT_DIGEST][:], strict=True)
        return
    image_columns = [name for name in ("images", "image") if name in dataset.column_names]
    with ui.progress("compare images", len(dataset), unit="rows") as bar:
        for row in as_stored(dataset.select_columns([*image_columns, "prompt"])):
            cells = row.get("images") or ([row["image"]] if row.get("image") else [])
            images = image_digest(map(_stored_bytes, cells))
            yield images, prompt_digest(row["prompt"], images)
            bar.advance()


def _stored_bytes(cell: dict[str, Any]) -> bytes:
    """The encoded image of a cell {"bytes", "path"}, as `datasets` stores it."""
    data: bytes | None = cell["bytes"]
    return data if data is not None else Path(cell["path"]).read_bytes()


def _numbers(keys: Iterable[Any]) -> list[int]:
    """0 for the first key and those equal to it, 1 for the next one that is different, ..."""
    seen: dict[Any, int] = {}
    return [seen.setdefault(key, len(seen)) for key in keys]
