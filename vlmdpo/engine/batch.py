"""What a collated batch holds, and what can be read off it without waiting for a device.

Shapes: B pairs, R rows of TRL's loss (2B), D distinct answers, T slots of the packed row, S length
of the longest stock row, C tokens of the longest answer.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from torch import Tensor

from vlmdpo.engine.tree import Forest


class PairBatch(TypedDict):
    """What `PairCollator` makes of B pairs, besides the processor's pixels and token types.

    For TRL: `input_ids` and `completion_mask`, chosen rows first; stock's `attention_mask`, by
    which TRL counts tokens. Packed (share=True):

        input_ids, completion_mask (R, 1 + C): column 0 is the last prompt token
        attention_mask (R, S): as stock's
        forest: what lies where in the packed row
        tree_ids (1, T): token ids of the packed row
        order (R,): which distinct answer each row of the loss is; absent where it is each once
        order_back (D,): a row of the loss for each distinct answer; beside `order`

    In rows (share=False): `input_ids`, `completion_mask` and `attention_mask` are (2B, S), and
    `image_copies` says that each image, given once, stands in two rows.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    forest: NotRequired[Forest]
    tree_ids: NotRequired[Tensor]
    order: NotRequired[Tensor]
    order_back: NotRequired[Tensor]
    image_copies: NotRequired[int]
    row: NotRequired[list[int]]  # B row numbers, for messages; no device needs them
    image_keys: NotRequired[list[str]]  # of each tree, or of each example: see `content_keys`
    answer_keys: NotRequired[list[str]]  # of each row of the loss


def image_token_ids(batch: dict[str, Any]) -> list[Tensor]:
    """The token ids that the images of a batch of `PairCollator` stand in: of each tree, or of each
    pair's chosen row.
    """
    if "forest" in batch:
        return list(batch["tree_ids"][0].split(batch["forest"].tree_lengths))
    return list(batch["input_ids"][: len(batch["input_ids"]) // 2])


def answer_ids(batch: dict[str, Any]) -> list[list[int]]:
    """The answer's token ids of each row of the loss."""
    rows = zip(batch["input_ids"], batch["completion_mask"], strict=True)
    return [ids[in_loss == 1].tolist() for ids, in_loss in rows]


def batch_tokens(batch: dict[str, Any]) -> tuple[int, int] | None:
    """(tokens of stock rows, slots that run in their place) of a packed batch; None for a batch in
    rows. The device is not waited for.
    """
    if "forest" not in batch:
        return None
    return batch["forest"].stock_tokens, batch["forest"].slots
