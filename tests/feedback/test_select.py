"""Pairs: the largest differences first, no text twice, lengths balanced, everything counted."""

import random

import pytest

from vlmdpo.engine.sampling import Sample
from vlmdpo.feedback.select import Scored, select


def _scored(key, *answers):
    """Answers as (text, tokens, score, finished)."""
    samples = [Sample(text, tokens, finished) for text, tokens, _, finished in answers]
    return Scored(key, samples, [score for _, _, score, _ in answers])


def _texts(one, pairs):
    return [(one.samples[p.chosen].text, one.samples[p.rejected].text) for p in pairs]


def _select(prompts, per_prompt=2, margin=1.0, gap=1.0):
    return select(prompts, per_prompt=per_prompt, margin=margin, max_length_gap=gap)


def test_the_largest_differences_come_first_and_of_equal_ones_like_lengths():
    one = _scored(
        "p",
        ("best", 10, 0, True),
        ("fair", 10, -1, True),
        ("bad", 30, -3, True),
        ("poor", 12, -3, True),
    )
    assert _texts(one, _select([one]).pairs) == [("best", "poor"), ("best", "bad")]
    assert _texts(one, _select([one], per_prompt=1).pairs) == [("best", "poor")]
    assert _texts(one, _select([one], per_prompt=9, margin=3).pairs) == [
        ("best", "poor"),
        ("best", "bad"),
    ]


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([("A dog.", 2, 0, True), ("a  dog", 2, -5, True)], "all_answers_equal"),
        ([("a", 2, 0, False), ("b", 2, -1, False)], "answers_cut_or_empty"),
        ([("a", 2, 0, True), ("b", 2, -9, False), ("A.", 2, 0, True)], "answers_cut_or_empty"),
        ([("a", 2, 0, True), ("A", 2, 0, True), ("b", 2, None, True)], "unread_verdicts"),
        ([("a", 2, None, True), ("b", 2, -1, True)], "unread_verdicts"),
        ([("a", 2, -1, True), ("b", 2, -1, True)], "no_difference_in_score"),
    ],
)
def test_a_prompt_without_a_pair_is_counted(answers, reason):
    selection = _select([_scored("p", *answers)])
    assert (selection.pairs, dict(selection.skipped)) == ([], {reason: 1})


def test_cut_and_unread_answers_are_never_paired():
    one = _scored(
        "p", ("a", 5, 0, False), ("b", 5, 0, True), ("c", 5, None, True), ("d", 5, -2, True)
    )
    assert _texts(one, _select([one], per_prompt=9).pairs) == [("b", "d")]


def test_lengths_are_balanced_by_replacing_and_leaving_out():
    """Here short answers are the better ones, as a count of denied statements makes them."""
    rng = random.Random(0)
    prompts = []
    for number in range(200):
        lengths = [rng.randint(5, 40) for _ in range(8)]
        answers = [
            (f"{i}", n, -round(n / 8 + rng.random() * 3), True) for i, n in enumerate(lengths)
        ]
        prompts.append(_scored(f"p{number}", *answers))
    unbalanced = _select(prompts).mean_lengths
    assert unbalanced[1] > 1.5 * unbalanced[0]
    selection = _select(prompts, gap=0.1)
    chosen, rejected = selection.mean_lengths
    assert abs(chosen - rejected) <= 0.1 * max(chosen, rejected)
    assert selection.replaced > 0
    assert len(selection.pairs) + selection.skipped["pairs_of_unlike_length"] == 400
    by_key = {one.key: one for one in prompts}
    lengths = [
        [by_key[p.key].samples[getattr(p, side)].tokens for p in selection.pairs]
        for side in ("chosen", "rejected")
    ]
    assert [sum(one) / len(one) for one in lengths] == pytest.approx([chosen, rejected])
    seen = [(p.key, p.chosen, p.rejected) for p in selection.pairs]
    assert len(seen) == len(set(seen))
