"""TRL's own collator, for the stock engine and to compare with.

In a module of its own because importing TRL's trainer takes a second.
"""

from __future__ import annotations

from typing import Any

from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from vlmdpo.engine.collate import Example, images_of


class StockCollator(DataCollatorForVisionPreference):
    """TRL's own collator, which also passes `row` on and takes examples whose `images` is None."""

    def torch_call(self, examples: list[Example]) -> dict[str, Any]:
        # TRL's collator drops columns it does not know, and fails on images that are None.
        rows = [example.pop("row") for example in examples] if "row" in examples[0] else None
        for example in examples:
            example["images"] = images_of(example)
        batch: dict[str, Any] = super().torch_call(examples)
        if rows is not None:
            batch["row"] = rows
        return batch
