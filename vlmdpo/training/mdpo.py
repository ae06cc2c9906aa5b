"""mDPO (Wang et al. 2024, arXiv 2406.11839): preference over images too, and an anchored reward.

With r(y | m) = beta * (log pi(y | m, x) - log pi_ref(y | m, x)) for image m, its corrupted copy m'
and question x:

    L = -log sigmoid(r(chosen | m) - r(rejected | m))    preference over answers (DPO)
        -log sigmoid(r(chosen | m) - r(chosen | m'))     the same answer, another image
        -log sigmoid(r(chosen | m) - 0)                  anchor: the chosen answer's reward above 0

Each term is TRL's sigmoid loss of one pair: (chosen, rejected), (chosen, chosen given m'), (chosen,
no answer, whose reward is zero). So a batch of B rows is given to TRL as 3B pairs, and its mean is
weighted by three. The model runs only what differs: the packed pair given m, and the chosen answer
given m'. This module knows nothing of models.

Shapes: B rows of a batch; 2B rows and their corrupted copies ("answers"); 3B pairs as TRL sees them
("terms"); 6B rows of those pairs, chosen ones first.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import Tensor

from vlmdpo.engine.collate import PairCollator, images_of
from vlmdpo.engine.content_keys import NO_ANSWER, ContentKeys, image_key
from vlmdpo.engine.plant import Planted

_SHOWN_AREA = (0.01, 0.2)  # the share of an image that its corrupted copy shows, as in the paper


def corrupt_image(image: Image.Image, seed: str) -> Image.Image:
    """A random crop of 1% to 20% of the image's area, scaled to its size; determined by `seed`."""
    rng = random.Random(seed)
    scale = rng.uniform(*_SHOWN_AREA) ** 0.5
    width, height = (max(1, round(side * scale)) for side in image.size)
    left, top = (
        rng.randint(0, whole - part)
        for whole, part in zip(image.size, (width, height), strict=True)
    )
    return image.crop((left, top, left + width, top + height)).resize(
        image.size, Image.Resampling.BICUBIC
    )


@dataclass
class MdpoCollator(PairCollator):
    """B examples → the packed pairs of B rows and their corrupted copies, as 3B pairs for TRL.

    `image_keys` are of rows and copies, `answer_keys` (6B,) of TRL's rows.

    Args:
        seed: determines, with an image's pixels, what its copy shows: the same in every row, order
            and slice of the data.
    """

    seed: int = 0

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(self._with_copies(examples))
        if "row" in batch:
            batch["row"] = batch["row"][: len(examples)]
        return {**batch, "answer_keys": _keys_of_terms(batch["answer_keys"])}

    def content_keys(self, examples: list[dict[str, Any]]) -> ContentKeys:
        """The keys that the batch of these examples has."""
        keys = super().content_keys(self._with_copies(examples))
        return {**keys, "answer_keys": _keys_of_terms(keys["answer_keys"])}

    def _with_copies(self, examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """B examples, then their B corrupted copies."""
        copies = []
        for example in examples:
            key = image_key(images_of(example))
            images = [
                corrupt_image(image, f"{self.seed}/{key}/{number}")
                for number, image in enumerate(images_of(example))
            ]
            copies.append({**example, "images": images})
        return [*examples, *copies]

    def _answers(
        self, texts: list[dict[str, str]], limits: list[int | None]
    ) -> tuple[list[Any], list[Any]]:
        """Both answers of each row, and the copies' chosen ones: a copy has no rejected answer."""
        chosen, rejected = super()._answers(texts, limits)
        count = len(rejected) // 2
        return chosen, [*rejected[:count], *[None] * count]

    def _packed_batch(self, planted: Planted, order: list[int]) -> dict[str, Any]:
        count = len(order) // 4
        batch = super()._packed_batch(planted, [order[number] for number in term_order(count)])
        batch["completion_mask"][5 * count :] = 0  # the anchor has no rejected answer
        for repeated in (slice(count, 3 * count), slice(5 * count, None)):
            batch["attention_mask"][repeated] = 0  # TRL only counts tokens by it
        tokens = int(batch["attention_mask"].sum())
        batch["forest"] = replace(batch["forest"], stock_tokens=tokens)
        return batch


def term_order(count: int) -> list[int]:
    """(6B,) the answer that each of TRL's rows is, for B = `count`.

    Answers are the chosen ones (2B) of rows and copies, then the rejected ones (2B).
    """
    rows = list(range(count))
    chosen_3B = rows * 3
    rejected_3B = [*(row + 2 * count for row in rows), *(row + count for row in rows), *rows]
    return chosen_3B + rejected_3B


def _keys_of_terms(answer_keys: list[str]) -> list[str]:
    """4B keys of the packed answers → 6B of TRL's rows. The anchor has no rejected answer."""
    order = term_order(len(answer_keys) // 4)
    anchors = len(order) // 6
    return [answer_keys[place] for place in order[:-anchors]] + [NO_ANSWER] * anchors


def mdpo_metrics(
    policy_6B: Tensor, reference_3B: tuple[Tensor, Tensor], beta: float
) -> dict[str, Tensor]:
    """Metrics by TRL's names, (B,) each: rewards of the rows' own answers, and the two other terms.

    Args:
        policy_6B: the policy's log-probs of TRL's rows.
        reference_3B: the reference's, chosen and rejected.
    """
    chosen_3B, rejected_3B = policy_6B.chunk(2)
    count = len(chosen_3B) // 3
    chosen_rewards_3B = beta * (chosen_3B - reference_3B[0])
    rejected_rewards_3B = beta * (rejected_3B - reference_3B[1])
    chosen_B, rejected_B = chosen_rewards_3B[:count], rejected_rewards_3B[:count]
    copy_B = rejected_rewards_3B[count : 2 * count]
    return {
        "rewards/chosen": chosen_B,
        "rewards/rejected": rejected_B,
        "rewards/accuracies": (chosen_B > rejected_B).float(),
        "rewards/margins": chosen_B - rejected_B,
        "rewards/conditional_accuracies": (chosen_B > copy_B).float(),
        "rewards/conditional_margins": chosen_B - copy_B,
        "rewards/anchored": (chosen_B > 0).float(),
        "logps/chosen": chosen_3B[:count],
        "logps/rejected": rejected_3B[:count],
    }
