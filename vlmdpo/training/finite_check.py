"""Are losses finite? Asked of the device once an optimizer step, because the host waits for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NonFiniteLoss(Exception):
    """The loss of a batch is NaN or infinite.

    Attributes:
        rows: the batch's row numbers.
        step: the optimizer step it belongs to, or after which it was evaluated.
        evaluated: whether the rows are of the test split.
    """

    def __init__(self, rows: list[int], step: int, *, evaluated: bool = False) -> None:
        super().__init__(f"the loss of step {step} is not finite (rows {rows})")
        self.rows, self.step, self.evaluated = rows, step, evaluated


class FiniteCheck:
    """The batches whose values nobody has looked at yet."""

    def __init__(self) -> None:
        self._batches: list[tuple[list[int], Tensor]] = []

    def add(self, rows: Sequence[int] | None, *values: Tensor) -> None:
        """Have the values of a batch checked later; the device compares, nothing is read."""
        finite = torch.stack([value.detach().isfinite().all() for value in values]).all()
        self._batches.append((list(rows or ()), finite))

    def first_non_finite(self) -> list[int] | None:
        """The rows of the first batch with a value that is not finite; None if there is none.

        Every batch is checked once.
        """
        batches, self._batches = self._batches, []
        finite = torch.stack([flag for _, flag in batches]).tolist() if batches else []
        return next(
            (rows for (rows, _), good in zip(batches, finite, strict=True) if not good), None
        )
