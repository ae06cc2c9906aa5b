"""How many tokens each row has, and what becomes of rows longer than `--max-length`.

Counts exactly what the collator would make, without decoding images wherever their size is enough.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset
from PIL import Image

from vlmdpo import ui
from vlmdpo.data.images import EncodedImage, open_bytes
from vlmdpo.data.pairs import SIDES, PreferencePair, TokenCounts, message, text_of
from vlmdpo.data.reasons import BadRow, foreign, shown
from vlmdpo.data.sources import as_stored
from vlmdpo.data.store import COUNTS
from vlmdpo.engine.collate import Example, PairCollator, cannot_render, render_example
from vlmdpo.models.chat_template import PromptSettings
from vlmdpo.models.digest import processor_digest
from vlmdpo.models.families import estimated_image_tokens, reserved_tokens
from vlmdpo.models.load import load_processor
from vlmdpo.models.protocols import Processor

# Image sizes that are processed before a processor's own estimate of a size is trusted.
_CONFIRMATIONS = 4
_Sizes = tuple[tuple[int, int], ...]  # (width, height) of each image of a row


@dataclass(frozen=True)
class RowLength(TokenCounts):
    """Tokens of one row of a dataset."""

    row: int


def _texts(pair: PreferencePair) -> list[str]:
    turns = (*pair.prompt, pair.chosen, pair.rejected)
    return [str(part["text"]) for turn in turns for part in turn["content"]]


class TokenCounter:
    """Counts a row's tokens as the collator would make them.

    An image's tokens depend on its size, and a little on the text beside it. Where the processor
    can estimate them from the size, its estimate is used once it has been right about the first few
    sizes, up to a constant; else an image is processed, once for each size.
    """

    def __init__(self, processor: Processor) -> None:
        self.collator = PairCollator(processor)
        self.processor = processor
        self.reserved = reserved_tokens(processor)
        self._placeholders = re.compile("|".join(map(re.escape, self.reserved)) or "$^")
        # Image tokens by image sizes and surroundings (see `_surroundings`).
        self._image_tokens: dict[tuple[_Sizes, str], int] = {}
        # By surroundings: what comes on top of the estimate, and how often that was confirmed.
        self._offsets: dict[str, tuple[int, int]] = {}
        self._trusts_estimates = True  # until the processor is wrong about a size
        self._takes_text_only = False  # once it has
        self._special = frozenset(getattr(processor.tokenizer, "all_special_tokens", ()))

    def notes(self, pair: PreferencePair) -> tuple[str, ...]:
        """What is odd about a pair for this model: its special tokens, written out in a text."""
        held = any(token in text for token in self._special for text in _texts(pair))
        return ("special_token_in_text",) if held else ()

    def count(self, pair: PreferencePair, images: list[EncodedImage]) -> TokenCounts:
        """Tokens of a checked pair.

        Raises:
            BadRow: template or processor refuses it, or its text contains their special tokens.
        """
        texts = _texts(pair)
        held = next((token for token in self.reserved for text in texts if token in text), None)
        if held is not None:
            raise BadRow(
                "placeholder_miscount", f"a text holds {held!r}, which the model reads as an image"
            )
        example = {
            "prompt": list(pair.prompt),
            "chosen": [pair.chosen],
            "rejected": [pair.rejected],
            "images": [{"bytes": image.data} for image in images],
        }
        return self.count_row(example)

    def count_row(self, example: Example) -> TokenCounts:
        """Tokens of a row of a prepared dataset, its images undecoded. Raises BadRow."""
        sizes = tuple(open_bytes(image["bytes"]).size for image in example["images"] or [])
        with foreign(BadRow, "chat_template_refuses"):
            texts = render_example(self.processor, example)
        with foreign(BadRow, "processor_refuses"):
            prompt = self._text_tokens(texts["prompt"])
            # A placeholder counts as one token of the text.
            extra = self._extra_tokens(texts["prompt"], sizes, prompt)
            chosen, rejected = (self._text_tokens(texts[side]) for side in SIDES)
        return TokenCounts(prompt + extra, chosen, rejected, images=extra + len(sizes))

    def _extra_tokens(self, text: str, sizes: _Sizes, text_tokens: int) -> int:
        """Tokens that images add to a rendered prompt of `text_tokens` tokens."""
        if not sizes:
            if not self._takes_text_only:  # PaliGemma's processor refuses
                self.collator.process_prompts([text], [[]])
                self._takes_text_only = True
            return 0
        key = sizes, self._surroundings(text)
        if key not in self._image_tokens:
            self._image_tokens[key] = self._measure(text, text_tokens, *key)
        return self._image_tokens[key]

    def _measure(self, text: str, text_tokens: int, sizes: _Sizes, surroundings: str) -> int:
        estimate = estimated_image_tokens(self.processor, sizes) if self._trusts_estimates else None
        offset, confirmations = self._offsets.get(surroundings, (0, 0))
        if estimate is not None and confirmations >= _CONFIRMATIONS:
            return estimate + offset
        # Blank ones: how many tokens an image has depends on its size alone.
        inputs = self.collator.process_prompts([text], [[Image.new("RGB", size) for size in sizes]])
        measured = int(inputs["attention_mask"].sum()) - text_tokens
        if estimate is not None and confirmations and estimate + offset != measured:
            self._trusts_estimates = False
        self._offsets[surroundings] = (measured - (estimate or 0), confirmations + 1)
        return measured

    def _surroundings(self, text: str) -> str:
        """One character for what follows each placeholder.

        Processors merge the tokens between neighbouring images, and add a space before words.
        """
        following = self._placeholders.split(text)[1:]
        return "".join(
            "|" if not piece else "_" if piece[0].isspace() else "<" if piece[0] == "<" else "x"
            for piece in following
        )

    def _text_tokens(self, text: str) -> int:
        return len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def trim(
        self, pair: PreferencePair, images: list[EncodedImage], limit: int
    ) -> tuple[PreferencePair, TokenCounts]:
        """The pair with answers cut so that prompt and answer have at most `limit` tokens.

        Answers end with a sentence if that keeps half of them, else with a word.

        Raises:
            BadRow: the prompt leaves no room, or both answers become the same.
        """
        counts = self.count(pair, images)
        while (
            max(excess := [getattr(counts, side) - (limit - counts.prompt) for side in SIDES]) > 0
        ):
            shortened = {
                side: self._shorten(text_of(getattr(pair, side)), tokens)
                for side, tokens in zip(SIDES, excess, strict=True)
                if tokens > 0
            }
            if not all(shortened.values()):
                raise BadRow(
                    "over_length",
                    f"a prompt of {counts.prompt} tokens leaves no room for answers within {limit}",
                )
            answers = {side: message("assistant", text) for side, text in shortened.items()}
            pair = dataclasses.replace(
                pair,
                chosen=answers.get("chosen", pair.chosen),
                rejected=answers.get("rejected", pair.rejected),
            )
            counts = self.count(pair, images)
        if text_of(pair.chosen) == text_of(pair.rejected):
            raise BadRow(
                "identical_once_trimmed",
                f"within {limit} tokens both answers are {shown(text_of(pair.chosen))}",
            )
        return pair, counts

    def _shorten(self, text: str, tokens: int) -> str:
        """The text without its last `tokens` tokens or a few more."""
        ends = [
            end
            for _, end in self.processor.tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True
            )["offset_mapping"]
        ]
        if tokens >= len(ends):
            return ""
        kept = text[: ends[len(ends) - tokens - 1]]
        sentence_end = max(kept.rfind(stop) for stop in (". ", "! ", "? ", ".\n", "\n")) + 1
        word_end = max(kept.rfind(" "), kept.rfind("\n"))
        if sentence_end > len(kept) // 2:
            return kept[:sentence_end].strip()
        cuts_a_word = text[len(kept) : len(kept) + 1].strip()
        return kept[:word_end].strip() if word_end > 0 and cuts_a_word else kept.strip()


def load_token_counter(
    model: str,
    revision: str | None,
    trust_remote_code: bool,
    prompts: PromptSettings | None = None,
) -> TokenCounter:
    """The counter of a model by its name, for processes that cannot be passed a processor."""
    return TokenCounter(
        load_processor(
            model, revision=revision, trust_remote_code=trust_remote_code, prompts=prompts
        )
    )


def known_lengths(
    processor: Processor, dataset: Dataset, manifest: dict[str, Any] | None
) -> list[RowLength] | None:
    """The tokens of every row, as `prepare` counted them with this very processor; None if it did
    not.
    """
    if (
        not manifest
        or manifest.get("processor") != processor_digest(processor, dated=False)
        or not set(COUNTS) <= set(dataset.column_names)
    ):
        return None
    columns = [dataset[name][:] for name in COUNTS]
    return [RowLength(*counts) for counts in zip(*columns, range(len(dataset)), strict=True)]


def row_lengths(
    processor: Processor, dataset: Dataset, manifest: dict[str, Any] | None = None
) -> list[RowLength]:
    """The tokens of every row, as `prepare` counted them with this very processor, or counted now.

    Args:
        manifest: the prepared dataset's; without one the rows are counted.

    Raises DataError for a row that the model's chat template cannot render.
    """
    known = known_lengths(processor, dataset, manifest)
    if known is not None:
        return known
    counter = TokenCounter(processor)
    lengths = []
    with ui.progress("count tokens", len(dataset)) as bar:
        for row, example in enumerate(as_stored(dataset)):
            try:
                counts = counter.count_row(example)
            except BadRow as problem:
                raise cannot_render(row, problem) from problem
            lengths.append(RowLength(**asdict(counts), row=row))
            bar.advance()
    return lengths


def apply_max_length(
    lengths: list[RowLength], limit: int, over_length: str
) -> tuple[list[int], list[dict[str, Any]]]:
    """Which rows stay, and what is done with those over the limit.

    Args:
        limit: tokens of prompt and answer together.
        over_length: "drop", or "trim" to cut answers at the limit; a prompt that fills it alone is
            dropped even so, because images are never cut.

    Returns:
        The numbers of the rows that stay, and a record for each one dropped or trimmed: its
        lengths, and `done`.
    """
    kept, records = [], []
    for length in lengths:
        if length.longest <= limit:
            kept.append(length.row)
            continue
        done = "trimmed" if over_length == "trim" and length.prompt < limit else "dropped"
        if done == "trimmed":
            kept.append(length.row)
        records.append({**asdict(length), "done": done})
    return kept, records
