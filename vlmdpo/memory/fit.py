"""Whether an estimated peak fits a GPU, and the largest batch that does: arithmetic on bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ERROR_BAND = 0.05  # how far an estimated peak may be off on a GPU


@dataclass(frozen=True)
class Verdict:
    """`word` is fits, tight (within the error band of the limit) or does not fit.

    Attributes:
        needed_bytes: the estimated peak.
        free_bytes: what is left; below 0: what is missing.
    """

    word: str
    needed_bytes: int
    free_bytes: int


def verdict(needed_bytes: float, capacity_bytes: int) -> Verdict:
    """Whether `needed_bytes` fit into `capacity_bytes`."""
    if needed_bytes > capacity_bytes:
        word = "does not fit"
    elif needed_bytes * (1 + ERROR_BAND) > capacity_bytes:
        word = "tight"
    else:
        word = "fits"
    return Verdict(word, round(needed_bytes), round(capacity_bytes - needed_bytes))


@dataclass(frozen=True)
class PeakByBatch:
    """The peak of each phase of a step as a line in the batch size, through two simulated sizes.

    Attributes:
        small, large: the two batch sizes, in pairs.
        at_small, at_large: phase → peak bytes at each.
    """

    small: int
    large: int
    at_small: Mapping[str, float]
    at_large: Mapping[str, float]

    def peak(self, batch_size: int) -> float:
        """Bytes in the highest phase of a step with this batch size."""
        share = (batch_size - self.small) / (self.large - self.small)
        return max(
            self.at_small[name] + share * (self.at_large[name] - self.at_small[name])
            for name in self.at_small
        )


def largest_batch_size(
    peaks: PeakByBatch, other_bytes: int, capacity_bytes: int, effective_batch_size: int
) -> int | None:
    """The largest divisor of the effective batch size that fits with the error band to spare.

    None if not even 1 does.
    """
    divisors = (n for n in range(effective_batch_size, 0, -1) if effective_batch_size % n == 0)
    for batch_size in divisors:
        if verdict(peaks.peak(batch_size) + other_bytes, capacity_bytes).word == "fits":
            return batch_size
    return None
