"""TRL's own collator, for the stock engine and to compare with.

In a module of its own because importing TRL's trainer takes a second.
"""

from __future__ import annotations

from typing import Any

from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from vlmdpo.engine.collate import Example, PairCollator, host_inputs, images_of
from vlmdpo.engine.content_keys import ContentKeys, content_keys
from vlmdpo.engine.processing import BatchingProcessor
from vlmdpo.models.inputs import inputs_by_token
from vlmdpo.models.protocols import Processor

# Inputs by token that TRL's collator extends over answers; others it leaves as the prompt's.
EXTENDED_BY_TRL = ("token_type_ids", "mm_token_type_ids")


class StockCollator(DataCollatorForVisionPreference):
    """TRL's own collator, given texts that are rendered as everywhere here.

    It also adds row numbers and content keys, and takes examples whose `images` is None.
    """

    def __init__(self, processor: Processor, max_length: int | None = None) -> None:
        super().__init__(BatchingProcessor(processor), max_length)
        self._pairs = PairCollator(processor)

    def torch_call(self, examples: list[Example]) -> dict[str, Any]:
        # TRL's collator renders as it likes, drops columns it does not know, and fails on images
        # that are None.
        batch: dict[str, Any] = super().torch_call(
            [{**self._pairs.render(example), "images": images_of(example)} for example in examples]
        )
        return {**batch, **host_inputs(examples)}

    def content_keys(self, examples: list[Example]) -> ContentKeys:
        """The keys that the batch of these examples has."""
        return content_keys(examples)

    def not_extended(self, example: Example) -> list[str]:
        """Names of a prompt's inputs by token that TRL leaves as long as the prompt."""
        prompt = self._pairs.render(example)["prompt"]
        inputs = self._pairs.process_prompts([prompt], [images_of(example)])
        names = inputs_by_token(inputs, inputs["input_ids"])
        return [name for name in names if name not in EXTENDED_BY_TRL]
