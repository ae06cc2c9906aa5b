"""One row as the model reads it: the ids of its batch as text, special tokens visible, and which of
them are in the loss.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from vlmdpo.data.pairs import SIDES
from vlmdpo.engine.batch import answer_ids
from vlmdpo.engine.collate import PairCollator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def preview(collator: PairCollator, row: dict[str, Any]) -> dict[str, Any]:
    """What the collator makes of a row of a prepared dataset.

    Returns:
        `images` (sizes as "640x480"), `prompt`, `chosen`, `rejected` as decoded text (a run of the
        same special token as "<image>×64"), `tokens` {part: count}, `loss_tokens` {side: [text of
        each token in the loss]}.
    """
    batch = collator([row])
    chosen, rejected = answer_ids(batch)
    prompt = batch["tree_ids"][0, : batch["forest"].lengths[0]].tolist()
    parts = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    tokenizer = collator.processor.tokenizer
    return {
        "images": [f"{image.width}x{image.height}" for image in row["images"]],
        **{name: _text(tokenizer, part) for name, part in parts.items()},
        "tokens": {name: len(part) for name, part in parts.items()},
        "loss_tokens": {side: _token_texts(tokenizer, parts[side]) for side in SIDES},
    }


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Ids as text, where a token repeated more than twice, as image tokens are, has its count."""
    text, pending = "", []
    for token, run in groupby(ids):
        count = len(list(run))
        if count <= 2:
            pending += [token] * count
            continue
        text += tokenizer.decode(pending) + f"{tokenizer.decode([token])}×{count}"
        pending = []
    return text + tokenizer.decode(pending)


def _token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text of each token; tokens that share the bytes of one character stand together."""
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        if text.endswith("\ufffd") and end < len(ids):
            continue
        pieces.append(text[len(before) :])
        before = text
    return pieces
