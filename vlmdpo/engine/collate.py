"""Pairs → batch: each image and prompt is processed once, and laid beside what TRL's loss expects.

This module knows nothing of models: it makes ids, masks and pixels, as TRL's own collator would,
without the copies.

Shapes: B pairs, T slots of the packed row (see `pair_layout`), S length of the longest stock row, C
tokens of the longest answer, L tokens of one text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NotRequired, TypedDict

import torch
from PIL import Image
from torch import Tensor

from vlmdpo.data.pairs import text_of
from vlmdpo.data.reasons import BadRow
from vlmdpo.engine.content_keys import ContentKeys, content_keys
from vlmdpo.engine.processing import BatchingProcessor
from vlmdpo.errors import DataError, ModelError
from vlmdpo.models.families import answer_token_type
from vlmdpo.models.inputs import image_inputs, inputs_by_token
from vlmdpo.models.protocols import Processor
from vlmdpo.models.rendering import CannotRender, render_answer, render_prompt

Example = dict[str, Any]  # a row of a prepared dataset
SIDES = ("chosen", "rejected")


class PairBatch(TypedDict):
    """What `PairCollator` makes of B pairs, besides the processor's pixels and token types.

    For TRL: `input_ids` and `completion_mask`, chosen rows first; stock's `attention_mask`, by
    which TRL counts tokens. Packed (share=True):

        input_ids, completion_mask (2B, 1 + C): column 0 is the last prompt token
        attention_mask (2B, S): as stock's
        pairs: B times [prompt, chosen, rejected], in tokens
        pair_ids (1, T): token ids of the packed row

    In rows (share=False): `input_ids`, `completion_mask` and `attention_mask` are (2B, S), and
    `image_copies` says that each image, given once, stands in two rows.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    pairs: NotRequired[list[list[int]]]
    pair_ids: NotRequired[Tensor]
    image_copies: NotRequired[int]
    row: NotRequired[list[int]]  # B row numbers, for messages; no device needs them
    image_keys: NotRequired[list[str]]  # of each example that is processed: see `content_keys`
    answer_keys: NotRequired[list[str]]  # of each row of the loss
    order: NotRequired[Tensor]  # which answer each row of the loss is, where not one each; see mDPO


@dataclass
class PairCollator:
    """Examples {images, prompt, chosen, rejected[, row]} → one batch of B pairs; see `PairBatch`.

    Args:
        processor: the model's processor.
        max_length: answers are cut so that prompt and answer stay within; image tokens never are.
        share: False gives both answers rows of their own, for models that cannot read two answers
            in one row; each image is still given once.
    """

    processor: Processor
    max_length: int | None = None
    share: bool = True
    # Whether inputs shaped like ids are by token; decided once for each name.
    _is_by_token: dict[str, bool] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self._process: Any = BatchingProcessor(self.processor)

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """A `PairBatch`, with the processor's pixels and token types.

        Raises DataError for a prompt that leaves no room for an answer, and for an empty answer.
        """
        texts = [self.render(example) for example in examples]
        inputs = self.process_prompts(
            [text["prompt"] for text in texts], [images_of(example) for example in examples]
        )
        inputs.pop("labels", None)  # PaliGemma's processor makes some; TRL has its own
        mask = inputs.pop("attention_mask").bool()
        ids = inputs.pop("input_ids")
        prompts = _unpad(ids, mask)
        names = self._names_by_token(inputs, ids, texts[0]["prompt"], images_of(examples[0]))
        types_by_name = {name: _unpad(inputs.pop(name), mask) for name in names}
        limits = [
            self._answer_limit(len(prompt), example)
            for prompt, example in zip(prompts, examples, strict=True)
        ]
        chosen, rejected = self._answers(texts, limits)
        make_batch, place_types = (
            (self._packed_batch, _pack) if self.share else (self._rows_batch, _pad_rows)
        )
        batch = make_batch(prompts, chosen, rejected)
        placed_types = {}
        for name, prompt_types in types_by_name.items():
            of_answers = [self._answer_type(name, types) for types in prompt_types]
            answer_types = [
                [
                    of_one.expand(len(answer), *of_one.shape)
                    for answer, of_one in zip(side, of_answers, strict=True)
                ]
                for side in (chosen, rejected)
            ]
            placed_types[name] = place_types(prompt_types, *answer_types)
        return {**batch, **placed_types, **inputs, **host_inputs(examples)}

    def content_keys(self, examples: list[Example]) -> ContentKeys:
        """The keys that the batch of these examples has."""
        return content_keys(examples)

    def render(self, example: Example) -> dict[str, str]:
        """Prompt and answers of one example as text.

        Raises DataError where the model's chat template cannot render it.
        """
        if isinstance(example["prompt"], str):
            return {name: example[name] for name in ("prompt", *SIDES)}
        try:
            return render_example(self.processor, example)
        except CannotRender as problem:
            raise cannot_render(example.get("row"), problem) from problem

    def process_prompts(self, texts: list[str], images: list[list[Image.Image]]) -> dict[str, Any]:
        """The processor's outputs for rendered prompts, padded on the left."""
        inputs: dict[str, Any] = self._process(
            images=images if any(images) else None,
            text=texts,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=False,  # the chat template has added them
        )
        return inputs

    def stock_rows(self, examples: list[Example]) -> dict[str, Any]:
        """The batch as TRL's collator lays it out, of our ids: each image stands in it twice."""
        rows = replace(self, share=False)(examples)
        rows.pop("image_copies")
        prompts = [self.render(example)["prompt"] for example in examples]
        images = [images_of(example) for example in examples]
        return {**rows, **image_inputs(self.process_prompts(prompts * 2, images * 2))}

    def _names_by_token(
        self, inputs: dict[str, Any], ids: Tensor, text: str, images: list[Image.Image]
    ) -> list[str]:
        """Names of the inputs that hold a value for each token, as token types do.

        The shape may be a coincidence (as many patches as tokens), so that a name has to hold for
        a longer prompt too: `text` is the first prompt's, with its images.
        """
        found = inputs_by_token(inputs, ids)
        if not all(name in self._is_by_token for name in found):
            longer = self.process_prompts([text + " a a a"], [images])
            of_longer = inputs_by_token(longer, longer["input_ids"])
            self._is_by_token |= {
                name: name in of_longer for name in found if name not in self._is_by_token
            }
        return [name for name in found if self._is_by_token[name]]

    def _answer_type(self, name: str, types: Tensor) -> Tensor:
        """What an input by token says of each token of an answer: as of the text before it.

        Args:
            types: (L, ...) what it says of the prompt, whose last token is text.

        Raises ModelError where it numbers the tokens.
        """
        if types.ndim == 1 and len(types) > 3 and bool((types[-3:].diff() == 1).all()):
            raise ModelError(
                f"the processor's '{name}' numbers the prompt's tokens, which cannot be extended "
                "over answers"
            )
        return answer_token_type(self.processor, name, types[-1])

    def _answer_limit(self, prompt_tokens: int, example: Example) -> int | None:
        """Tokens that an answer may have behind this prompt. Raises DataError where none."""
        if self.max_length is None:
            return None
        if prompt_tokens >= self.max_length:
            where = f"row {example['row']}" if "row" in example else "a row"
            raise DataError(
                f"--max-length {self.max_length}: {where} has a prompt of {prompt_tokens} tokens, "
                "images included, which leaves no room for an answer; give a larger limit or none"
            )
        return self.max_length - prompt_tokens

    def _answers(
        self, texts: list[dict[str, str]], limits: list[int | None]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Token ids (L,) of all chosen and of all rejected answers, cut to their limits."""
        chosen, rejected = (
            [self._answer_ids(text[side], limit) for text, limit in zip(texts, limits, strict=True)]
            for side in SIDES
        )
        return chosen, rejected

    def _answer_ids(self, text: str, limit: int | None) -> Tensor:
        """(L,) the answer's token ids, cut to `limit`."""
        ids = self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ][0]
        if len(ids) == 0:
            raise DataError("an answer has no tokens; run vlmdpo prepare, which drops such rows")
        return ids[:limit].long()

    def _packed_batch(
        self,
        prompts: list[Tensor],
        chosen: list[Tensor],
        rejected: list[Tensor],
    ) -> PairBatch:
        """A batch to run as one packed row. All arguments are lists of B tensors (L,)."""
        answers = [*chosen, *rejected]
        last = [prompt[-1:] for prompt in prompts]
        return {
            "input_ids": self._pad(_join([*last, *last], answers)),
            "attention_mask": _stock_attention_mask(prompts, answers),
            "completion_mask": _completion_mask([*last, *last], answers),
            "pairs": [list(map(len, pair)) for pair in zip(prompts, chosen, rejected, strict=True)],
            "pair_ids": _pack(prompts, chosen, rejected),
        }

    def _rows_batch(
        self,
        prompts: list[Tensor],
        chosen: list[Tensor],
        rejected: list[Tensor],
    ) -> PairBatch:
        """A batch of one row per answer. All arguments are lists of B tensors (L,)."""
        answers = [*chosen, *rejected]
        twice = [*prompts, *prompts]
        return {
            "input_ids": self._pad(_join(twice, answers)),
            "attention_mask": _stock_attention_mask(prompts, answers),
            "completion_mask": _completion_mask(twice, answers),
            "image_copies": 2,
        }

    def _pad(self, rows: list[Tensor]) -> Tensor:
        """(L,) each → (rows, longest L), padded on the right."""
        tokenizer = self.processor.tokenizer
        padding = tokenizer.pad_token_id
        if padding is None:
            padding = tokenizer.eos_token_id
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)


def batch_tokens(batch: dict[str, Any]) -> tuple[int, int] | None:
    """(tokens of stock rows, slots that run in their place) of a packed batch; None for a batch in
    rows. The device is not waited for.
    """
    if "pairs" not in batch:
        return None
    stock = sum(
        prompt + answer for prompt, *answers in batch["pairs"] for answer in answers if answer
    )
    return stock, sum(sum(lengths) + 1 for lengths in batch["pairs"])


def pair_token_ids(batch: dict[str, Any]) -> list[Tensor]:
    """The token ids of each pair of a batch of `PairCollator`, its images' tokens once."""
    if "pairs" in batch:
        # A pair's slots are its tokens and the prompt's last token once more.
        return list(batch["pair_ids"][0].split([sum(lengths) + 1 for lengths in batch["pairs"]]))
    return list(batch["input_ids"][: len(batch["input_ids"]) // 2])


def host_inputs(examples: list[Example]) -> dict[str, Any]:
    """What a batch holds for the host: its rows' numbers, if they have any, and content keys."""
    numbered = {"row": [example["row"] for example in examples]} if "row" in examples[0] else {}
    return {**numbered, **content_keys(examples)}


def cannot_render(row: int | None, problem: BadRow) -> DataError:
    """The error for a row of prepared data that a model's chat template cannot render."""
    where = "a row" if row is None else f"row {row}"
    return DataError(
        f"{where}: {problem}; run vlmdpo prepare with this --model, which drops such rows"
    )


def render_example(processor: Processor, example: Example) -> dict[str, str]:
    """Prompt and answers of one example as text. Raises CannotRender."""
    answers = {side: render_answer(processor, text_of(example[side][0])) for side in SIDES}
    return {"prompt": render_prompt(processor, example["prompt"]), **answers}


def images_of(example: Example) -> list[Image.Image]:
    """The images of an example; empty where it has none."""
    return list(example.get("images") or [])


def _unpad(padded: Tensor, mask: Tensor) -> list[Tensor]:
    """(B, longest L) → B times (L,): each row's values where `mask` is true."""
    return [row[keep] for row, keep in zip(padded, mask, strict=True)]


def _join(prompts: Sequence[Tensor], answers: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(prompts, answers, strict=True)]


def _completion_mask(prompts: Sequence[Tensor], answers: Sequence[Tensor]) -> Tensor:
    """(rows, longest L): 1 where a token is an answer's, 0 for prompt and padding."""
    masks = _join([torch.zeros_like(p) for p in prompts], [torch.ones_like(a) for a in answers])
    return torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)


def _stock_attention_mask(prompts: Sequence[Tensor], answers: Sequence[Tensor]) -> Tensor:
    """(2B, S): 1 where a stock row has a token. `answers`: 2B, chosen first."""
    lengths = torch.tensor(
        [len(p) + len(a) for p, a in zip([*prompts, *prompts], answers, strict=True)]
    )
    return (torch.arange(int(lengths.max())) < lengths[:, None]).long()


def _pack(
    prompts: Sequence[Tensor], chosen: Sequence[Tensor], rejected: Sequence[Tensor]
) -> Tensor:
    """(1, T): each pair as prompt but its last token, then last token and answer, twice."""
    parts = [
        torch.cat([prompt[:-1], prompt[-1:], first, prompt[-1:], second])
        for prompt, first, second in zip(prompts, chosen, rejected, strict=True)
    ]
    return torch.cat(parts)[None]


def _pad_rows(
    prompts: Sequence[Tensor], chosen: Sequence[Tensor], rejected: Sequence[Tensor]
) -> Tensor:
    """(2B, S): prompt and answer, chosen rows first, zeros behind."""
    rows = _join([*prompts, *prompts], [*chosen, *rejected])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
