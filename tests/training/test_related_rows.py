"""Which rows the engine is checked with."""

import pytest

from tests.support.engines import RANKING, pairs, related_pairs
from vlmdpo.training.related_rows import related_rows


@pytest.mark.parametrize(
    ("rows", "count", "expected"),
    [
        ([(0, 0, 0, 1), (1, 0, 0, 1), (0, 1, 2, 3), (0, 0, 2, 1)], 4, [0, 3, 2]),
        ([(0, 0, 0, 1), (1, 0, 0, 1), (0, 1, 2, 3), (0, 0, 2, 1)], 2, [0, 2]),
        ([(0, 0, 0, 1), (1, 1, 0, 1), (1, 1, 0, 2)], 4, [1, 2]),
        ([(None, 0, 0, 1), (None, 1, 0, 1), (None, 1, 0, 2)], 4, [1, 2]),
        (RANKING, 4, [0, 1, 2, 3]),
    ],
)
def test_rows_that_share_an_image_and_a_prompt_are_found(rows, count, expected):
    assert related_rows(related_pairs(*rows), count) == expected


def test_unrelated_rows_stay_alone():
    assert len(related_rows(pairs(3), 4)) == 1
