"""A part of a benchmark has the proportions of the whole."""

from collections import Counter

import pytest

from vlmdpo.benchmarks.amber.published import why_not_beside_article
from vlmdpo.benchmarks.sampling import stratified

ITEMS = [
    (kind, number) for kind, count in (("a", 60), ("b", 30), ("c", 10)) for number in range(count)
]


def draw(limit):
    return stratified(ITEMS, limit, lambda item: item[0])


@pytest.mark.parametrize("limit", [1, 7, 10, 33, 99])
def test_every_stratum_has_its_share_to_within_one(limit):
    part = draw(limit)
    assert len(part) == limit
    counts = Counter(kind for kind, _ in part)
    for kind, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
        assert abs(counts[kind] - share * limit) <= 1
    assert part == sorted(part, key=ITEMS.index), "in the order of the whole"


def test_the_draw_is_always_the_same_and_smaller_parts_lie_within_larger_ones():
    assert draw(20) == draw(20)
    assert set(draw(10)) < set(draw(20))
    assert draw(10) != ITEMS[:10]
    assert draw(None) == draw(100) == draw(1000) == ITEMS


def test_published_figures_stand_beside_whole_runs_only():
    report = {
        "is_amber": True,
        "questions": {"Discriminative": 14216},
        "models": {"base": {"answered": 14216}, "tuned": {"answered": 1}},
    }
    assert why_not_beside_article(report) == "only 1 of 14,216 questions were answered"
    report["models"].pop("tuned")
    assert why_not_beside_article(report) is None
    assert "not all of AMBER" in why_not_beside_article({**report, "is_amber": False})
