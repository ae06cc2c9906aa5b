"""How sure a difference is: two models' answers to the same questions, compared question by question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """Tuned against base. `delta_accuracy` and `ci95` are in percentage points; flips are counted in questions."""

    delta_accuracy: float
    ci95: tuple[float, float]
    mcnemar_p: float
    fixed: int  # wrong before, right after
    broken: int  # right before, wrong after


def compare(
    base_right: Sequence[bool], tuned_right: Sequence[bool], image_of: Sequence[str], *, draws: int = 2000, seed: int = 0
) -> Comparison:
    """Difference in accuracy with a 95% paired bootstrap interval over images, and the exact McNemar p-value.

    Questions about one picture are not independent, so the bootstrap draws pictures, each with all its questions.
    McNemar's exact test (McNemar 1947; two-sided binomial on the flips) treats questions as independent.

    Args:
        base_right, tuned_right, image_of: aligned, one entry a question.
        draws: bootstrap samples.
        seed: of the draws.
    """
    import numpy as np
    from scipy.stats import binomtest

    before, after = np.asarray(base_right, dtype=bool), np.asarray(tuned_right, dtype=bool)
    change = after.astype(float) - before.astype(float)
    _, group = np.unique(np.asarray(image_of), return_inverse=True)
    gain_of_image = np.bincount(group, weights=change)
    questions_of_image = np.bincount(group)
    drawn = np.random.default_rng(seed).integers(0, len(questions_of_image), (draws, len(questions_of_image)))
    deltas = 100 * gain_of_image[drawn].sum(axis=1) / questions_of_image[drawn].sum(axis=1)
    low, high = np.percentile(deltas, [2.5, 97.5])
    fixed, broken = int((after & ~before).sum()), int((before & ~after).sum())
    p = float(binomtest(fixed, fixed + broken, 0.5).pvalue) if fixed + broken else 1.0
    return Comparison(100 * float(change.mean()), (float(low), float(high)), p, fixed, broken)
