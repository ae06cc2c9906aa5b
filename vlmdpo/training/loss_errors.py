"""Errors that the trainer raises about a loss; the command above turns them into messages."""

from __future__ import annotations


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
