"""Answers are split into statements without losing what they say."""

import pytest

from vlmdpo.feedback.judges.split import claims_of


def _texts(answer):
    return [claim.text for claim in claims_of("What is this?", answer)]


@pytest.mark.parametrize(
    ("answer", "statements"),
    [
        ("A man rides a horse. He is smiling!", ["A man rides a horse.", "He is smiling!"]),
        (
            "The image shows two dogs, a cat and a red bus.",
            [
                "The image shows two dogs.",
                "The image shows a cat.",
                "The image shows a red bus.",
            ],
        ),
        (
            "A dog runs, and a child watches it while the sun shines.",
            ["A dog runs", "a child watches it", "the sun shines."],
        ),
        (
            "1. A table of 2.5 metres\n2. **Chairs**: four",
            ["A table of 2.5 metres", "Chairs: four"],
        ),
        ("Mr. Smith waits. Mr. Smith waits.", ["Mr. Smith waits."]),
        ("There is a man and he is tall.", ["There is a man and he is tall."]),
        ("Two cats; three dogs sleep here.", ["Two cats", "three dogs sleep here."]),
    ],
)
def test_statements(answer, statements):
    assert _texts(answer) == statements


def test_a_short_answer_is_judged_together_with_its_question():
    (claim,) = claims_of('Is there a "bus"?', "Yes")
    assert (claim.text, claim.kind) == ("Yes", "answer")
    assert 'Is "Yes" a right answer to the question "Is there a \'bus\'?"?' in claim.question
    assert claims_of("What?", "") == []


def test_no_word_is_lost():
    answer = "The photo, taken at dusk, shows a pier and people who fish; the sea is calm."
    kept = " ".join(_texts(answer)).replace(".", "")
    assert all(word.strip(".,;") in kept for word in answer.split())
