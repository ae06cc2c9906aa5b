"""How many tokens each row has, and what becomes of those that are longer than `--max-length`.

Counts exactly what the collator would make, without the pictures' pixels where a picture of that size was seen before.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset, Image, List
from PIL import Image as PillowImage

from vlmdpo import ui
from vlmdpo.dpo.batch import PairCollator


@dataclass(frozen=True)
class RowLength:
    """Tokens of one row: its prompt with its images, and both answers."""

    row: int
    prompt: int
    chosen: int
    rejected: int

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two sequences that stock TRL would make of it."""
        return self.prompt + max(self.chosen, self.rejected)


def row_lengths(processor: Any, dataset: Dataset) -> list[RowLength]:
    """Count the tokens of every row. A picture's tokens depend on its size alone, so each size is processed once."""
    counter = _Counter(processor)
    unread = dataset.cast_column("images", List(Image(decode=False)))
    with ui.progress("count tokens", len(dataset)) as bar:
        found = []
        for row, example in enumerate(unread):
            found.append(counter.count(row, example))
            bar.advance()
    return found


class _Counter:
    def __init__(self, processor: Any) -> None:
        self.collator = PairCollator(processor)
        self.tokenizer = processor.tokenizer
        self.extra: dict[tuple[tuple[int, int], ...], int] = {}  # by image sizes: tokens beyond the template's text

    def count(self, row: int, example: dict[str, Any]) -> RowLength:
        images = [PillowImage.open(io.BytesIO(image["bytes"])) for image in example["images"] or []]
        texts = self.collator.render({**example, "images": images})
        prompt = self._tokens(texts["prompt"])
        sizes = tuple(image.size for image in images)
        if sizes not in self.extra:
            whole = self.collator.prompts([texts["prompt"]], [images])
            self.extra[sizes] = int(whole["attention_mask"].sum()) - prompt
        return RowLength(row, prompt + self.extra[sizes], self._tokens(texts["chosen"]), self._tokens(texts["rejected"]))

    def _tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def sift(lengths: list[RowLength], limit: int, over_length: str) -> tuple[list[int], list[dict[str, Any]]]:
    """Which rows stay, and what is done with the ones over the limit.

    Args:
        limit: tokens of prompt and answer together.
        over_length: "drop", or "trim" to cut answers at the limit; a prompt that fills it alone is dropped even so,
            because images are never cut.

    Returns the rows that stay, and a record for each one dropped or trimmed: its lengths and `done`.
    """
    stay, records = [], []
    for length in lengths:
        if length.longest <= limit:
            stay.append(length.row)
            continue
        done = "trimmed" if over_length == "trim" and length.prompt < limit else "dropped"
        if done == "trimmed":
            stay.append(length.row)
        records.append({**asdict(length), "done": done})
    return stay, records
