"""TRL's own collator, for the stock engine and to compare with. Importing TRL's trainer takes a
second, so `batch` does not.
"""

from __future__ import annotations

from typing import Any

import torch
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from vlmdpo.engine.collate import images_of


class StockCollator(DataCollatorForVisionPreference):
    """TRL's own collator, which also hands on `row` and takes examples whose `images` is None."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [example.pop("row") for example in examples] if "row" in examples[0] else None
        for example in examples:
            example["images"] = images_of(example)
        batch: dict[str, Any] = super().torch_call(examples)
        if rows is not None:
            batch["row"] = torch.tensor(rows)
        return batch
