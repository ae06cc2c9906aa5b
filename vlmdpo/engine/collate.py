"""Pairs → batch: each image and prompt is processed once, and laid beside what TRL's loss expects.

This module knows nothing of models: it makes ids, masks and pixels, as TRL's own collator would,
without the copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.data_utils import apply_chat_template, prepare_multimodal_messages

from vlmdpo.errors import DataError
from vlmdpo.models.families import TYPE_KEYS, answer_token_type


@dataclass
class PairCollator:
    """Examples {images, prompt, chosen, rejected[, row]} → one packed batch of B pairs.

    The batch holds, for TRL: `input_ids` and `completion_mask` (2B, 1 + C), chosen rows first,
    whose column 0 is the last prompt token, and stock's `attention_mask` (2B, S), which TRL counts
    tokens by. For the packed forward: `pairs`, B times [prompt, chosen, rejected] tokens,
    `pair_ids` (1, T), token types (1, T) where the processor makes them, and the pixels of each
    image once. `row` (B,) passes through.

    Args:
        processor: the model's processor.
        max_length: answers are cut so that prompt and answer stay within; image tokens never are.
        share: False gives both answers rows of their own (2B, S), still with each image once: for
            models that cannot read two answers in one row.
    """

    processor: Any
    max_length: int | None = None
    share: bool = True

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [self.render(example) for example in examples]
        prompts = self.prompts(
            [text["prompt"] for text in texts], [images_of(example) for example in examples]
        )
        mask = prompts.pop("attention_mask").bool()
        ids = prompts.pop("input_ids")
        prompts.pop("labels", None)  # PaliGemma's processor makes some; TRL has its own
        prompt_ids = [row[keep] for row, keep in zip(ids, mask, strict=True)]
        room = [
            self._room(len(row), example) for row, example in zip(prompt_ids, examples, strict=True)
        ]
        answers = {
            side: [self._answer(text[side], limit) for text, limit in zip(texts, room, strict=True)]
            for side in ("chosen", "rejected")
        }
        types = {name: prompts.pop(name) for name in TYPE_KEYS if name in prompts}
        types = {
            name: [row[keep] for row, keep in zip(kind, mask, strict=True)]
            for name, kind in types.items()
        }
        made = self._packed if self.share else self._rows
        batch = made(prompt_ids, answers["chosen"], answers["rejected"], types)
        if "row" in examples[0]:
            batch["row"] = torch.tensor([example["row"] for example in examples])
        return {**batch, **prompts}

    def render(self, example: dict[str, Any]) -> dict[str, str]:
        """The texts of one example, through the chat template, split into prompt and answers as TRL
        does.
        """
        if isinstance(example["prompt"], str):
            return {name: example[name] for name in ("prompt", "chosen", "rejected")}
        messages = {
            "prompt": prepare_multimodal_messages(example["prompt"], images=images_of(example)),
            "chosen": prepare_multimodal_messages(example["chosen"]),
            "rejected": prepare_multimodal_messages(example["rejected"]),
        }
        rendered: dict[str, str] = apply_chat_template(messages, self.processor)
        return rendered

    def prompts(self, texts: list[str], images: list[list[Any]]) -> dict[str, Any]:
        return dict(
            self.processor(
                images=images if any(images) else None,
                text=texts,
                padding=True,
                padding_side="left",
                return_tensors="pt",
                add_special_tokens=False,  # the chat template has put them in
            )
        )

    def _room(self, prompt_tokens: int, example: dict[str, Any]) -> int | None:
        if self.max_length is None:
            return None
        if prompt_tokens >= self.max_length:
            where = f"row {example['row']}" if "row" in example else "a row"
            raise DataError(
                f"--max-length {self.max_length}: {where} has a prompt of {prompt_tokens} tokens, "
                "images included, "
                "which leaves no room for an answer; give a larger limit or none"
            )
        return self.max_length - prompt_tokens

    def _answer(self, text: str, limit: int | None) -> Tensor:
        ids = self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ][0]
        if len(ids) == 0:
            raise DataError("an answer has no tokens; run vlmdpo prepare, which drops such rows")
        return ids[:limit].long()

    def _stock_mask(self, prompts: Sequence[Tensor], answers: Sequence[Tensor]) -> Tensor:
        lengths = torch.tensor(
            [len(p) + len(a) for p, a in zip([*prompts, *prompts], answers, strict=True)]
        )
        return (torch.arange(int(lengths.max())) < lengths[:, None]).long()

    def _packed(
        self,
        prompts: list[Tensor],
        chosen: list[Tensor],
        rejected: list[Tensor],
        types: dict[str, list[Tensor]],
    ) -> dict[str, Any]:
        answers = [*chosen, *rejected]
        last = [prompt[-1:] for prompt in prompts]
        pad = self._pad
        batch: dict[str, Any] = {
            "input_ids": pad([torch.cat(two) for two in zip([*last, *last], answers, strict=True)]),
            "attention_mask": self._stock_mask(prompts, answers),
            "completion_mask": torch.nn.utils.rnn.pad_sequence(
                [
                    torch.cat([torch.zeros(1, dtype=torch.long), torch.ones_like(answer)])
                    for answer in answers
                ],
                batch_first=True,
            ),
            "pairs": [
                list(map(len, three)) for three in zip(prompts, chosen, rejected, strict=True)
            ],
            "pair_ids": _pack(prompts, chosen, rejected),
        }
        for name, kinds in types.items():
            kind = answer_token_type(self.processor, name)
            batch[name] = _pack(
                kinds,
                [torch.full_like(a, kind) for a in chosen],
                [torch.full_like(a, kind) for a in rejected],
            )
        return batch

    def _rows(
        self,
        prompts: list[Tensor],
        chosen: list[Tensor],
        rejected: list[Tensor],
        types: dict[str, list[Tensor]],
    ) -> dict[str, Any]:
        answers = [*chosen, *rejected]
        twice = [*prompts, *prompts]
        batch: dict[str, Any] = {
            "input_ids": self._pad([torch.cat(two) for two in zip(twice, answers, strict=True)]),
            "attention_mask": self._stock_mask(prompts, answers),
            "completion_mask": torch.nn.utils.rnn.pad_sequence(
                [
                    torch.cat([torch.zeros_like(p), torch.ones_like(a)])
                    for p, a in zip(twice, answers, strict=True)
                ],
                batch_first=True,
            ),
            "image_copies": 2,
        }
        for name, kinds in types.items():
            kind = answer_token_type(self.processor, name)
            rows = [
                torch.cat([p, torch.full_like(a, kind)])
                for p, a in zip([*kinds, *kinds], answers, strict=True)
            ]
            batch[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return batch

    def _pad(self, rows: list[Tensor]) -> Tensor:
        tokenizer = self.processor.tokenizer
        pad = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)


def row_ids(inputs: dict[str, Any]) -> list[Tensor]:
    """The token ids of each pair of a batch of `PairCollator`, images' tokens once."""
    if "pairs" in inputs:
        return list(inputs["pair_ids"][0].split([sum(lengths) + 1 for lengths in inputs["pairs"]]))
    return list(inputs["input_ids"][: len(inputs["input_ids"]) // 2])


def images_of(example: dict[str, Any]) -> list[Any]:
    """The pictures of an example, none of them where it has none."""
    return list(example.get("images") or [])


def _pack(
    prompts: Sequence[Tensor], chosen: Sequence[Tensor], rejected: Sequence[Tensor]
) -> Tensor:
    """(1, T): each pair as prompt but its last token, then last token and answer, twice."""
    parts = [
        torch.cat([prompt[:-1], prompt[-1:], first, prompt[-1:], second])
        for prompt, first, second in zip(prompts, chosen, rejected, strict=True)
    ]
    return torch.cat(parts)[None]
