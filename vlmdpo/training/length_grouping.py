"""The order in which rows are visited when rows of similar length share a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class LengthGroupedSampler(Sampler[int]):
    """Rows of similar length together, otherwise at random; a new order every epoch.

    The order depends on seed and epoch alone. transformers' own sampler draws from the global
    generator, which differs between processes and after a resume, so that rows would be visited
    twice or never.

    Args:
        lengths: tokens of each row.
        batch_size: rows of an optimizer step over all processes: the order is the same however
            they are distributed.
        seed: of the run.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = list(lengths), batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
