"""mDPO (Wang et al. 2024, arXiv 2406.11839): preference over pictures too, and an anchor for the
chosen answer's reward.

With r(y | m) = beta * (log pi(y | m, x) - log pi_ref(y | m, x)), for picture m, its corrupted copy
m', question x:

    L = -log sigmoid(r(chosen | m) - r(rejected | m))    preference over answers (DPO) -log
        sigmoid(r(chosen | m) - r(chosen | m'))     conditional preference: the same answer, another
        picture -log sigmoid(r(chosen | m) - 0)                  anchor: the chosen answer's own
        reward is above zero

Each term is TRL's sigmoid loss of a pair: (chosen, rejected), (chosen, chosen of m'), (chosen,
nothing, whose reward is zero). So a batch of B rows is given to TRL as 3B pairs, and its mean
counts three times. The model runs only what differs: the packed pair of m, and m' with the chosen
answer. This module knows nothing of models.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmdpo.engine.collate import PairCollator

WEIGHT = 3.0  # of TRL's mean over 3B pairs, which makes it the sum of the three terms' means
_AREA = (0.01, 0.2)  # the share of a picture that its corrupted copy shows, as in the paper


def corrupt_image(picture: Image.Image, seed: str) -> Image.Image:
    """A random part of the picture, 1% to 20% of its area, at the picture's own size: the same for
    the same seed.
    """
    chance = random.Random(seed)
    scale = chance.uniform(*_AREA) ** 0.5
    width, height = (max(1, round(side * scale)) for side in picture.size)
    left, top = (
        chance.randint(0, whole - part)
        for whole, part in zip(picture.size, (width, height), strict=True)
    )
    return picture.crop((left, top, left + width, top + height)).resize(
        picture.size, Image.Resampling.BICUBIC
    )


@dataclass
class MdpoCollator(PairCollator):
    """B examples → the packed pairs of B rows and of their corrupted copies, shown to TRL as 3B
    pairs.

    `order` (6B,) says which of the packed answers each of TRL's rows is; of `row` (2B,), the
    copies' have `rows` added.

    Args:
        rows: how many rows the dataset has.
        seed: of what the copies show.
    """

    rows: int = 0
    seed: int = 0

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        copies = []
        for example in examples:
            seeds = (
                f"{self.seed}/{example['row']}/{number}" for number in range(len(example["images"]))
            )
            pictures = [
                corrupt_image(picture, seed)
                for picture, seed in zip(example["images"], seeds, strict=True)
            ]
            copies.append({**example, "images": pictures, "row": self.rows + example["row"]})
        return super().__call__([*examples, *copies])

    def _packed(
        self,
        prompts: list[Tensor],
        chosen: list[Tensor],
        rejected: list[Tensor],
        types: dict[str, list[Tensor]],
    ) -> dict[str, Any]:
        count = len(prompts) // 2
        none = [answer[:0] for answer in rejected[count:]]
        batch = super()._packed(prompts, chosen, [*rejected[:count], *none], types)
        order = rows_of_terms(count)
        for name in ("input_ids", "attention_mask", "completion_mask"):
            batch[name] = batch[name][order]
        batch["completion_mask"][5 * count :] = 0  # the anchor's rejected answer is none
        for repeated in (slice(count, 3 * count), slice(5 * count, None)):
            batch["attention_mask"][repeated] = 0  # which only says how many tokens are counted
        return {**batch, "order": order}


def rows_of_terms(count: int) -> Tensor:
    """(6B,) for each row of TRL's the packed answer it is: those are chosen (2B) of rows and
    copies, then rejected (2B).
    """
    one = torch.arange(count)
    return torch.cat([one, one, one, one + 2 * count, one + count, one])


def by_answer(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs (3B,), (3B,) of TRL's rows → (2B,), (2B,) of rows and copies, which have no
    rejected answer: 0.
    """
    count = len(chosen) // 3
    first, copies = rejected[:count], rejected[count : 2 * count]
    return torch.cat([chosen[:count], copies]), torch.cat([first, torch.zeros_like(first)])


def by_term(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """The way back: log-probs of rows and copies (2B,), (2B,) → of TRL's rows (3B,), (3B,)."""
    count = len(chosen) // 2
    first, copies = chosen.split(count)
    return torch.cat([first] * 3), torch.cat([rejected[:count], copies, torch.zeros_like(first)])


def metrics(policy: Tensor, reference: tuple[Tensor, Tensor], beta: float) -> dict[str, Tensor]:
    """What is logged, (B,) each: the rewards of the rows' own answers, and how far the two other
    terms are satisfied.

    Args:
        policy: (6B,) log-probs of TRL's rows.
        reference: (3B,), (3B,) the reference's.
    """
    chosen, rejected = policy.chunk(2)
    count = len(chosen) // 3
    rewards = [beta * (p - r) for p, r in zip((chosen, rejected), reference, strict=True)]
    good, bad, copy = rewards[0][:count], rewards[1][:count], rewards[1][count : 2 * count]
    return {
        "rewards/chosen": good,
        "rewards/rejected": bad,
        "rewards/accuracies": (good > bad).float(),
        "rewards/margins": good - bad,
        "rewards/conditional_accuracies": (good > copy).float(),
        "rewards/conditional_margins": good - copy,
        "rewards/anchored": (good > 0).float(),
        "logps/chosen": chosen[:count],
        "logps/rejected": rejected[:count],
    }
