"""What counts as exact."""

import math

import pytest

from vlmdpo.training.engine_checks import _is_exact


@pytest.mark.parametrize(
    ("error", "noise", "other_image", "layouts", "exact"),
    [
        (4.8e-7, 4.8e-7, 1.9, [4.8e-7, 0.0], True),  # answers of two tokens hide broken layouts
        (5.8e-7, 4.8e-7, 1.9, [4.8e-7], True),
        (1.2e-6, 9.5e-7, 3.0, [1.2e-6, 1.2e-6, 0.79], True),  # with two threads
        (1.2e-6, 9.5e-7, 3.0, [5e-6, 0.79], False),
        (0.0, 0.0, math.inf, [], True),
        (1e-6, 5e-7, math.inf, [0.7, 2e-2], True),
        (0.05, 5e-7, 1.9, [0.05], False),  # as wrong as the broken one
        (4.4e-3, 5.6e-3, 4.5e-4, [0.1], False),  # another image fits better
        (1e-3, 5e-7, math.inf, [5e-7], False),  # nothing to compare with but rounding
        (1e-3, 5e-7, math.inf, [], False),
    ],
)
def test_errors_are_compared_with_what_can_be_seen(error, noise, other_image, layouts, exact):
    assert _is_exact(error, noise, other_image, layouts) is exact
