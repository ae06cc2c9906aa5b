"""All that a training run needs, once it is loaded and wired up: see `build`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

    from vlmdpo.models.protocols import Processor
    from vlmdpo.training.keep_best import KeepBest
    from vlmdpo.training.monitor import TrainingMonitor
    from vlmdpo.training.run_trainer import RunTrainer
    from vlmdpo.training.sharing import Sharing
    from vlmdpo.training.token_count import Tokens

_EXAMPLES = 4
_EXAMPLE_POOL = 64


@dataclass
class TrainingSetup:
    """A run that is ready to train.

    Attributes:
        dataset: the rows that train.
        fallback_reason: why the engine is not the shared one; None if it is, or was not wanted.
        over_length: lengths and fate of the rows over `--max-length`.
        data: the prepared folder.
        keep_best: chooses the weights that are saved, if not those of the last step.
        sharing: what rows have in common.
        tokens: those of all processes, once training has ended; of a resumed run those since then.
        is_resumed: whether it goes on from a checkpoint.
        lineage: the adapters that it goes on from, the first one first; see `training.lineage`.
    """

    trainer: RunTrainer
    processor: Processor
    dataset: Dataset
    monitor: TrainingMonitor
    fallback_reason: str | None
    over_length: list[dict[str, Any]]
    data: Path
    keep_best: KeepBest | None = None
    sharing: Sharing | None = None
    tokens: Tokens | None = None
    is_resumed: bool = False
    lineage: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_sharded(self) -> bool:
        """Whether no process has the whole model, so that a forward pass needs all of them."""
        from vlmdpo.config.common import SHARDED_STRATEGIES
        from vlmdpo.distributed.processes import launched_strategy

        return launched_strategy() in SHARDED_STRATEGIES

    def related_examples(self) -> list[dict[str, Any]]:
        """Rows to check the engine with, as many as a batch has at most: where rows share images or
        prompts, some that do.
        """
        count = min(_EXAMPLES, self.trainer.args.per_device_train_batch_size)
        from vlmdpo.training.related_rows import related_rows

        rows = related_rows(self.trainer.train_dataset, count)
        if len(rows) < 2:  # no two rows are related
            return self.examples(1)
        return [self.trainer.train_dataset[row] for row in rows]

    def examples(self, count: int = _EXAMPLES) -> list[dict[str, Any]]:
        """Rows to check with: among the first, those with long answers, where mistakes show."""
        texts = self.trainer.train_dataset.select_columns(["chosen", "rejected"])[:_EXAMPLE_POOL]
        lengths = [
            min(len(str(chosen)), len(str(rejected)))
            for chosen, rejected in zip(texts["chosen"], texts["rejected"], strict=True)
        ]
        longest = sorted(range(len(lengths)), key=lambda row: -lengths[row])[:count]
        return [self.trainer.train_dataset[row] for row in longest]
