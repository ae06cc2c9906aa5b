"""How many tokens each row has, and what becomes of those that are longer than `--max-length`.

Counts exactly what the collator would make, without the pictures' pixels wherever their size tells
enough.
"""

from __future__ import annotations

import dataclasses
import io
import re
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from PIL import Image as PillowImage

from vlmdpo import ui
from vlmdpo.data.images import EncodedImage
from vlmdpo.data.pairs import BadRow, PreferencePair, TokenCounts, message, text_of
from vlmdpo.data.sources import as_stored
from vlmdpo.data.store import COUNTS
from vlmdpo.engine.collate import PairCollator
from vlmdpo.models.digest import processor_digest
from vlmdpo.models.families import image_tokens, reserved_tokens
from vlmdpo.models.load import load_processor

_CONFIRMED = (
    4  # picture sizes that are processed before what a processor tells of a size is taken without
)


@dataclass(frozen=True)
class RowLength(TokenCounts):
    """Tokens of one row of a dataset."""

    row: int


class TokenCounter:
    """Counts a row's tokens as the collator would make them.

    A picture's tokens depend on its size, and a little on what stands beside its place. Where the
    processor can tell them from the size it is asked, once it has been right, up to a constant,
    about the first few; else the picture is processed, once for each size.
    """

    def __init__(self, processor: Any) -> None:
        self.collator = PairCollator(processor)
        self.processor = processor
        self.reserved = reserved_tokens(processor)
        self._places = re.compile("|".join(map(re.escape, self.reserved)) or "$^")
        self._known: dict[
            tuple[tuple[tuple[int, int], ...], str], int
        ] = {}  # by sizes and shape of the prompt
        self._offsets: dict[
            str, tuple[int, int]
        ] = {}  # by shape: what comes on top of what is told, and how often it did
        self._trusted = True  # until the processor is wrong about a size

    def count(self, pair: PreferencePair, pictures: list[EncodedImage]) -> TokenCounts:
        """Tokens of a checked pair. Raises BadRow where template or processor refuse it, or its
        text holds their tokens.
        """
        texts = [
            str(part["text"])
            for turn in (*pair.prompt, pair.chosen, pair.rejected)
            for part in turn["content"]
        ]
        held = next((token for token in self.reserved for text in texts if token in text), None)
        if held is not None:
            raise BadRow(
                "placeholder_miscount", f"a text holds {held!r}, which the model reads as a picture"
            )
        example = {
            "prompt": list(pair.prompt),
            "chosen": [pair.chosen],
            "rejected": [pair.rejected],
        }
        try:
            return self.count_row(
                {**example, "images": [{"bytes": picture.data} for picture in pictures]}
            )
        except (
            TemplateError,
            ValueError,
        ) as problem:  # a template's raise_exception, a processor's refusal
            kind = (
                "chat_template_refuses"
                if isinstance(problem, TemplateError)
                else "processor_refuses"
            )
            raise BadRow(kind, str(problem).splitlines()[0]) from problem

    def count_row(self, example: dict[str, Any]) -> TokenCounts:
        """Tokens of a row of a prepared dataset, its pictures undecoded."""
        pictures = [
            PillowImage.open(io.BytesIO(image["bytes"])) for image in example["images"] or []
        ]
        texts = self.collator.render({**example, "images": pictures})
        prompt = self._tokens(texts["prompt"])
        extra = self._extra(texts["prompt"], pictures, prompt) if pictures else 0
        counted = (self._tokens(texts["chosen"]), self._tokens(texts["rejected"]))
        return TokenCounts(prompt + extra, *counted, images=extra + len(pictures))

    def _extra(self, text: str, pictures: list[Any], tokens: int) -> int:
        """Tokens that pictures add to a rendered prompt of so many tokens."""
        sizes, shape = tuple(picture.size for picture in pictures), self._shape(text)
        if (sizes, shape) not in self._known:
            told = image_tokens(self.processor, sizes) if self._trusted else None
            offset, confirmed = self._offsets.get(shape, (0, 0))
            if told is None or confirmed < _CONFIRMED:
                whole = self.collator.process_prompts(
                    [text], [[picture.convert("RGB") for picture in pictures]]
                )
                seen = int(whole["attention_mask"].sum()) - tokens
                if told is not None and confirmed and told + offset != seen:
                    self._trusted = False
                self._offsets[shape] = (seen - (told or 0), confirmed + 1)
                told, offset = seen, 0
            self._known[sizes, shape] = told + offset
        return self._known[sizes, shape]

    def _shape(self, text: str) -> str:
        """What stands behind each picture's place: processors join the marks of neighbours, and add
        a space before words.
        """
        behind = self._places.split(text)[1:]
        return "".join(
            "|" if not piece else "_" if piece[0].isspace() else "<" if piece[0] == "<" else "x"
            for piece in behind
        )

    def _tokens(self, text: str) -> int:
        return len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def trim(
        self, pair: PreferencePair, pictures: list[EncodedImage], limit: int
    ) -> tuple[PreferencePair, TokenCounts]:
        """The pair with both answers cut to `limit` tokens with the prompt: at a sentence's end,
        else a word's.

        Raises:
            BadRow: the prompt leaves no room, or both answers become the same.
        """
        counts = self.count(pair, pictures)
        over = {
            side: getattr(counts, side) - (limit - counts.prompt) for side in ("chosen", "rejected")
        }
        while max(over.values()) > 0:
            cut = {
                side: self._cut(text_of(getattr(pair, side)), by)
                for side, by in over.items()
                if by > 0
            }
            if not all(cut.values()):
                raise BadRow(
                    "over_length",
                    f"a prompt of {counts.prompt} tokens leaves no room for answers within {limit}",
                )
            answers = {side: message("assistant", text) for side, text in cut.items()}
            pair = dataclasses.replace(
                pair,
                chosen=answers.get("chosen", pair.chosen),
                rejected=answers.get("rejected", pair.rejected),
            )
            counts = self.count(pair, pictures)
            over = {side: getattr(counts, side) - (limit - counts.prompt) for side in over}
        if text_of(pair.chosen) == text_of(pair.rejected):
            raise BadRow(
                "identical_once_trimmed",
                f"within {limit} tokens both answers are {text_of(pair.chosen)[:60]!r}",
            )
        return pair, counts

    def _cut(self, text: str, by: int) -> str:
        """The text without its last `by` tokens or a little more."""
        ends = [
            end
            for _, end in self.processor.tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True
            )["offset_mapping"]
        ]
        if by >= len(ends):
            return ""
        kept = text[: ends[len(ends) - by - 1]]
        sentence = max(kept.rfind(stop) for stop in (". ", "! ", "? ", ".\n", "\n")) + 1
        word = max(kept.rfind(" "), kept.rfind("\n"))
        if sentence > len(kept) // 2:
            return kept[:sentence].strip()
        return (
            kept[:word].strip()
            if word > 0 and text[len(kept) : len(kept) + 1].strip()
            else kept.strip()
        )


def load_token_counter(model: str, revision: str | None, trust_remote_code: bool) -> TokenCounter:
    """The counter of a model by its name, for processes that cannot be handed a processor."""
    return TokenCounter(
        load_processor(model, revision=revision, trust_remote_code=trust_remote_code)
    )


def row_lengths(
    processor: Any, dataset: Dataset, manifest: dict[str, Any] | None = None
) -> list[RowLength]:
    """The tokens of every row: as `prepare` counted them where it did so with this very processor,
    else counted now.

    Args:
        manifest: the prepared dataset's; without one the rows are counted.
    """
    if (
        manifest
        and manifest.get("processor") == processor_digest(processor)
        and set(COUNTS) <= set(dataset.column_names)
    ):
        columns = [dataset[name][:] for name in COUNTS]
        return [RowLength(*counts) for counts in zip(*columns, range(len(dataset)), strict=True)]
    counter = TokenCounter(processor)
    found = []
    with ui.progress("count tokens", len(dataset)) as bar:
        for row, example in enumerate(as_stored(dataset)):
            found.append(RowLength(**asdict(counter.count_row(example)), row=row))
            bar.advance()
    return found


def apply_max_length(
    lengths: list[RowLength], limit: int, over_length: str
) -> tuple[list[int], list[dict[str, Any]]]:
    """Which rows stay, and what is done with the ones over the limit.

    Args:
        limit: tokens of prompt and answer together.
        over_length: "drop", or "trim" to cut answers at the limit; a prompt that fills it alone is
            dropped even so, because images are never cut.

    Returns the rows that stay, and a record for each one dropped or trimmed: its lengths and
    `done`.
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
