"""How sure a figure is: bootstrap over pictures, since questions about one picture are not
independent, and McNemar.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Interval = tuple[float, float]
DRAWS = 2000


@dataclass(frozen=True)
class Comparison:
    """Tuned against base. `delta_accuracy` and `ci95` are in percentage points; flips are counted
    in questions.
    """

    delta_accuracy: float
    ci95: Interval
    mcnemar_p: float
    fixed: int  # wrong before, right after
    broken: int  # right before, wrong after


class Bootstrap:
    """Draws of pictures, each with all that was asked of it; 95% intervals are percentiles over the
    draws.

    Args:
        image_of: the picture of each entry that figures are made of.
        draws: bootstrap samples.
        seed: of the draws.
    """

    def __init__(self, image_of: Sequence[str], *, draws: int = DRAWS, seed: int = 0) -> None:
        import numpy as np

        _, self._group = np.unique(np.asarray(image_of), return_inverse=True)
        self._images = int(self._group.max()) + 1
        share = np.full(self._images, 1 / self._images)
        self._times = (
            np.random.default_rng(seed).multinomial(self._images, share, size=draws).astype(float)
        )

    def drawn(self, values: Sequence[float]) -> Any:
        """(draws,) the sum of one value per entry over each draw's pictures."""
        import numpy as np

        return self._times @ np.bincount(
            self._group, weights=np.asarray(values, dtype=float), minlength=self._images
        )

    def per_cent(self, part: Sequence[float], whole: Sequence[float]) -> Any:
        """(draws,) 100 × the sum of `part` over the sum of `whole`; not a number where a draw holds
        nothing.
        """
        import numpy as np

        with np.errstate(invalid="ignore", divide="ignore"):
            return 100 * self.drawn(part) / self.drawn(whole)

    @staticmethod
    def interval(values: Any) -> Interval | None:
        """The middle 95% of the draws; None where none of them is a number."""
        import numpy as np

        known = values[~np.isnan(values)]
        if not len(known):
            return None
        low, high = np.percentile(known, [2.5, 97.5])
        return float(low), float(high)


def compare(
    base_right: Sequence[bool],
    tuned_right: Sequence[bool],
    image_of: Sequence[str],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Comparison:
    """Difference in accuracy with a 95% paired bootstrap interval over images, and the exact
    McNemar p-value.

    McNemar's exact test (McNemar 1947; two-sided binomial on the flips) treats questions as
    independent.

    Args:
        base_right, tuned_right, image_of: aligned, one entry a question.
        draws: bootstrap samples.
        seed: of the draws.
    """
    import numpy as np
    from scipy.stats import binomtest

    before, after = np.asarray(base_right, dtype=bool), np.asarray(tuned_right, dtype=bool)
    change = after.astype(float) - before.astype(float)
    bootstrap = Bootstrap(image_of, draws=draws, seed=seed)
    interval = bootstrap.interval(bootstrap.per_cent(change.tolist(), [1.0] * len(change)))
    assert interval is not None, "every draw holds questions"
    fixed, broken = int((after & ~before).sum()), int((before & ~after).sum())
    p = float(binomtest(fixed, fixed + broken, 0.5).pvalue) if fixed + broken else 1.0
    return Comparison(100 * float(change.mean()), interval, p, fixed, broken)
