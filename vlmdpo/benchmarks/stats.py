"""How certain a figure is: a bootstrap over images, and McNemar's test.

Images are drawn, not questions, because questions about one image are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy.typing

Interval = tuple[float, float]
Values: TypeAlias = "Sequence[float] | numpy.typing.NDArray[Any]"  # one per entry
DRAWS = 2000


@dataclass(frozen=True)
class Comparison:
    """Tuned against base; `delta_accuracy` and `ci95` in percentage points."""

    delta_accuracy: float
    ci95: Interval
    mcnemar_p: float
    fixed: int  # questions that base answered wrong and tuned right
    broken: int  # questions that base answered right and tuned wrong


def wilson(part: int, whole: int) -> Interval:
    """The 95% interval of a share, in per cent, by Wilson's score: it holds for few votes too."""
    z2 = 1.959963984540054**2
    share = part / whole
    centre = share + z2 / (2 * whole)
    spread = (z2 * (share * (1 - share) / whole + z2 / (4 * whole**2))) ** 0.5
    low, high = ((centre + side * spread) / (1 + z2 / whole) for side in (-1, 1))
    return 100 * max(0.0, low), 100 * min(1.0, high)


class Bootstrap:
    """Draws of images with all that was asked about them. 95% intervals are percentiles.

    Args:
        image_of: the image of each entry from which figures are computed.
        draws: bootstrap samples.
        seed: of the draws.
    """

    def __init__(self, image_of: Sequence[str], *, draws: int = DRAWS, seed: int = 0) -> None:
        import numpy as np

        _, self._group = np.unique(np.asarray(image_of), return_inverse=True)
        self._images = int(self._group.max()) + 1
        share = np.full(self._images, 1 / self._images)
        self._counts = (
            np.random.default_rng(seed).multinomial(self._images, share, size=draws).astype(float)
        )

    def sums(self, values: Values) -> Any:
        """(draws,) the sum over each draw's images of one value per entry."""
        import numpy as np

        return self._counts @ np.bincount(
            self._group, weights=np.asarray(values, dtype=float), minlength=self._images
        )

    def quotients(self, part: Values, whole: Values, scale: float = 1.0) -> Any:
        """(draws,) `scale` × the sum of `part` over the sum of `whole`; NaN where that is 0 / 0.

        All NaN for one image: every draw is that image, which says nothing of how they vary.
        """
        import numpy as np

        if self._images == 1:
            return np.full(len(self._counts), np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            return scale * self.sums(part) / self.sums(whole)

    @staticmethod
    def interval(values: Any) -> Interval | None:
        """The middle 95% of the draws that are not NaN; None if there are none."""
        import numpy as np

        numbers = values[~np.isnan(values)]
        if not len(numbers):
            return None
        low, high = np.percentile(numbers, [2.5, 97.5])
        return float(low), float(high)


def compare(
    base_right: Values,
    tuned_right: Values,
    image_of: Sequence[str],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Comparison:
    """Difference in accuracy, its 95% paired bootstrap interval, and the exact McNemar p-value.

    McNemar's exact test (McNemar 1947; two-sided binomial on the flips) treats questions as
    independent.

    Args:
        base_right, tuned_right, image_of: aligned, one entry per question.
        draws: bootstrap samples.
        seed: of the draws.
    """
    import numpy as np
    from scipy.stats import binomtest

    before, after = np.asarray(base_right, dtype=bool), np.asarray(tuned_right, dtype=bool)
    change = after.astype(float) - before.astype(float)
    bootstrap = Bootstrap(image_of, draws=draws, seed=seed)
    drawn = bootstrap.interval(bootstrap.quotients(change, np.ones(len(change)), 100))
    interval = (-100.0, 100.0) if drawn is None else drawn  # one image: anything is possible
    fixed, broken = int((after & ~before).sum()), int((before & ~after).sum())
    p = float(binomtest(fixed, fixed + broken, 0.5).pvalue) if fixed + broken else 1.0
    return Comparison(100 * float(change.mean()), interval, p, fixed, broken)
