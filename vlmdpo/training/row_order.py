"""The order in which rows train, where it is not simply random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlmdpo.data.groups import RowGroups
from vlmdpo.training.image_grouping import ImageGroupedSampler
from vlmdpo.training.length_grouping import LengthGroupedSampler

if TYPE_CHECKING:
    from torch.utils.data import Sampler
    from transformers import TrainingArguments


def grouped_sampler(
    groups: RowGroups | None, lengths: Sequence[int] | None, args: TrainingArguments
) -> Sampler[int] | None:
    """The order of an epoch in which rows are grouped by image, by length, or by both.

    Args:
        groups, lengths: what rows share, and their tokens; None for what they are not grouped by.

    Returns None for neither.
    """
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if groups is not None:
        return ImageGroupedSampler(groups, rows_per_step, args.seed, lengths)
    if lengths is not None:
        return LengthGroupedSampler(lengths, rows_per_step, args.seed)
    return None
