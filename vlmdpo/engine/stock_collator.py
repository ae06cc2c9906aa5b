"""TRL's own collator, for the stock engine and to compare with.

In a module of its own because importing TRL's trainer takes a second.
"""

from __future__ import annotations

from typing import Any

from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from vlmdpo.engine.collate import Example, PairCollator, images_of
from vlmdpo.engine.processing import BatchingProcessor
from vlmdpo.models.protocols import Processor


class StockCollator(DataCollatorForVisionPreference):
    """TRL's own collator, given texts that are rendered as everywhere here.

    It also passes `row` on, and takes examples whose `images` is None.
    """

    def __init__(self, processor: Processor, max_length: int | None = None) -> None:
        super().__init__(BatchingProcessor(processor), max_length)
        self._render = PairCollator(processor).render

    def torch_call(self, examples: list[Example]) -> dict[str, Any]:
        # TRL's collator renders as it likes, drops columns it does not know, and fails on images
        # that are None.
        rows = [example["row"] for example in examples] if "row" in examples[0] else None
        batch: dict[str, Any] = super().torch_call(
            [{**self._render(example), "images": images_of(example)} for example in examples]
        )
        if rows is not None:
            batch["row"] = rows
        return batch
