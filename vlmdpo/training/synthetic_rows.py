"""Rows of a given size, for estimates of memory and benchmarks."""

from __future__ import annotations

import itertools
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datasets import Dataset
from PIL import Image

from vlmdpo.data import store
from vlmdpo.data.pairs import message

if TYPE_CHECKING:
    from vlmdpo.models.protocols import Processor

_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Workload:
    """The size of the longest rows.

    Attributes:
        image: (width, height) of each image, in pixels.
        images: images per row.
        prompt, chosen, rejected: tokens of text.
        pairs_per_prompt: rows of one image and prompt.
    """

    image: tuple[int, int]
    images: int
    prompt: int
    chosen: int
    rejected: int
    pairs_per_prompt: int = 1


def synthetic_rows(processor: Processor, workload: Workload, count: int) -> Dataset:
    """Rows with plain images and text of the workload's length; the template adds its own.

    Each `pairs_per_prompt` rows have one image and prompt, which no other rows have, and answers
    that all differ: nothing is shared but image and prompt.
    """
    text = _Texts(processor)
    rows = []
    for number in range(count):
        prompt, pair = divmod(number, workload.pairs_per_prompt)
        color = (128, 128 ^ prompt >> 8 & 255, 128 ^ prompt & 255)  # the first is gray
        images = [Image.new("RGB", workload.image, color) for _ in range(workload.images)]
        rows.append(
            {
                "images": images,
                "prompt": [message("user", text(workload.prompt, prompt), workload.images)],
                "chosen": [message("assistant", text(workload.chosen, 2 * pair))],
                "rejected": [message("assistant", text(workload.rejected, 2 * pair + 1))],
            }
        )
    return Dataset.from_list(rows, features=store.pair_features())


class _Texts:
    """Texts of a number of tokens, and as many different ones of each as there can be."""

    def __init__(self, processor: Processor) -> None:
        def ids(word: str) -> tuple[int, ...]:
            text = f" {word}" * 64
            return tuple(processor.tokenizer(text, add_special_tokens=False)["input_ids"])

        found = {ids(letter): letter for letter in reversed(_LETTERS)}  # one letter of equal ids
        length = len(ids("a"))
        self._per_word = length / 64
        alike = sorted(letter for tokens, letter in found.items() if len(tokens) == length)
        self._words = ["a", *(letter for letter in alike if letter != "a")]

    def __call__(self, tokens: int, number: int) -> str:
        """The text with this number, of `tokens` tokens: texts differ from their first words on."""
        count = max(1, round(tokens / self._per_word))
        words = []
        for _ in itertools.repeat(None, count):
            number, letter = divmod(number, len(self._words))
            words.append(self._words[letter])
        return " ".join(words)
