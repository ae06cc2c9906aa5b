"""One row as the model reads it: the very ids of the batch as text, special tokens visible, and
which are in the loss.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from vlmdpo.engine.collate import PairCollator


def preview(collator: PairCollator, row: dict[str, Any]) -> dict[str, Any]:
    """What the collator makes of a row of a prepared dataset.

    Returns:
        `images` (sizes as "640x480"), `prompt`, `chosen`, `rejected` as decoded text (a run of the
        same special token as "<image>×64"), `tokens` {part: count}, `loss_tokens` {side: [text of
        each token in the loss]}.
    """
    batch = collator([row])
    lengths = dict(zip(("prompt", "chosen", "rejected"), batch["pairs"][0], strict=True))
    ids = batch["pair_ids"][0].tolist()
    prompt = lengths["prompt"]
    chosen_at, rejected_at = (
        prompt,
        prompt + lengths["chosen"] + 1,
    )  # each branch begins with the prompt's last token
    parts = {
        "prompt": ids[:prompt],
        "chosen": ids[chosen_at : chosen_at + lengths["chosen"]],
        "rejected": ids[rejected_at : rejected_at + lengths["rejected"]],
    }
    tokenizer = collator.processor.tokenizer
    return {
        "images": [f"{picture.width}x{picture.height}" for picture in row["images"]],
        **{name: _text(tokenizer, part) for name, part in parts.items()},
        "tokens": {name: len(part) for name, part in parts.items()},
        "loss_tokens": {side: _pieces(tokenizer, parts[side]) for side in ("chosen", "rejected")},
    }


def _text(tokenizer: Any, ids: list[int]) -> str:
    """Ids as text; a token repeated more than twice, as the places of a picture are, is written
    once with its count.
    """
    said, plain = "", []
    for token, run in groupby(ids):
        count = len(list(run))
        if count <= 2:
            plain += [token] * count
            continue
        said += tokenizer.decode(plain) + f"{tokenizer.decode([token])}×{count}"
        plain = []
    return said + tokenizer.decode(plain)


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token, so that together they are the text; tokens of one character's bytes
    stand together.
    """
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        if text.endswith("\ufffd") and end < len(ids):
            continue
        pieces.append(text[len(before) :])
        before = text
    return pieces
