"""Does it fit, how much room is left, and which batch is the largest that does? Arithmetic on
foreseen peaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BAND = 0.05  # how far a foreseen peak may be off on a GPU


@dataclass(frozen=True)
class Verdict:
    """`word`: fits, tight (within the error band of the limit) or does not fit. Bytes: needed, and
    free (below 0: missing).
    """

    word: str
    needed_bytes: int
    free_bytes: int


def verdict(needed_bytes: float, capacity_bytes: int) -> Verdict:
    """Whether so much fits into that much."""
    if needed_bytes > capacity_bytes:
        word = "does not fit"
    elif needed_bytes * (1 + BAND) > capacity_bytes:
        word = "tight"
    else:
        word = "fits"
    return Verdict(word, round(needed_bytes), round(capacity_bytes - needed_bytes))


@dataclass(frozen=True)
class Line:
    """The peak of each phase as a line in the batch size, through two foreseen batches."""

    small: int
    large: int
    at_small: Mapping[str, float]
    at_large: Mapping[str, float]

    def peak(self, batch: int) -> float:
        """Bytes at the highest phase of a step with so many pairs."""
        share = (batch - self.small) / (self.large - self.small)
        return max(
            self.at_small[name] + share * (self.at_large[name] - self.at_small[name])
            for name in self.at_small
        )


def largest_batch(line: Line, other_bytes: int, capacity_bytes: int, effective: int) -> int | None:
    """The largest divisor of the effective batch that fits with the error band to spare; None where
    even 1 does not.
    """
    for batch in sorted((b for b in range(1, effective + 1) if effective % b == 0), reverse=True):
        if verdict(line.peak(batch) + other_bytes, capacity_bytes).word == "fits":
            return batch
    return None
