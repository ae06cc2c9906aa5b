"""The table in docs/models.md: each row is made again and compared."""

import pytest

from tests.support import matrix
from tests.support.matrix import DOCS, FAMILIES, examine, row
from vlmdpo.tiny import random_models

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.small)
def test_each_row_of_the_table_matches_what_happens(family):
    if family.missing:
        pytest.skip(f"needs {', '.join(family.missing)}")
    made = row(family, examine(family))
    assert made in DOCS.read_text(encoding="utf-8").splitlines(), (
        f"python -m tests.support.matrix --write; it is now: {made}"
    )


def test_every_family_has_one_row():
    table = DOCS.read_text(encoding="utf-8").partition(matrix.BEGIN)[2].partition(matrix.END)[0]
    assert table.count("\n| ") == len(FAMILIES) + 1
    made = {family.small for family in FAMILIES}
    assert made | set(matrix.NOT_TRAINED) == set(random_models.FAMILIES)
