"""Judges that ask: what they ask, and what they make of replies."""

import pytest
from PIL import Image

from vlmdpo.feedback.answerers import Reply
from vlmdpo.feedback.judges.base import NO, YES, Claim, Task
from vlmdpo.feedback.judges.claims import SPLIT_PROMPT, ClaimsJudge, read_claims
from vlmdpo.feedback.judges.statements import StatementsJudge
from vlmdpo.feedback.judges.truth import NOT_ANNOTATED, AmberTruth, TruthJudge
from vlmdpo.tiny import evaluation


class _Model:
    """Says no to what holds a word of `false`, nothing readable to "fog", and yes otherwise."""

    at_once = 4

    def __init__(self, *false, completion=""):
        self.false, self.completion, self.asked, self.completed = false, completion, [], []

    def ask(self, asked, max_new_tokens, *, with_log_odds=False):
        self.asked += [list(questions) for _, questions in asked]
        return [[self._told(one, with_log_odds) for one in questions] for _, questions in asked]

    def _told(self, question, with_log_odds):
        text = self._reply(question)
        return Reply(text, (-2.0 if text[0] == "N" else 2.0) if with_log_odds else None)

    def _reply(self, question):
        if "fog" in question:
            return "Perhaps."
        return "No, not at all." if any(word in question for word in self.false) else "Yes."

    def complete(self, texts, max_new_tokens):
        self.completed += texts
        return [self.completion] * len(texts)


def _task(*answers, prompt="Describe.", name="a.png"):
    return Task(name, b"", Image.new("RGB", (4, 4)), ((prompt, answers),))


def test_each_statement_of_an_image_is_asked_once():
    model = _Model("cat")
    judge = StatementsJudge(model, with_log_odds=True)
    shared = "A dog lies here. A cat sleeps here."
    [[[first, second]], [[third]]] = judge.judge(
        [_task(shared, "A dog lies here. There is fog outside."), _task("A cat sleeps here.")]
    )
    assert [len(questions) for questions in model.asked] == [3, 1]
    assert [one.verdict for one in first.statements] == [YES, NO]
    assert [one.log_odds for one in first.statements] == [2.0, -2.0]
    assert [one.verdict for one in second.statements] == [YES, None]
    assert second.unread_verdicts == 1
    assert third.denied == 1
    [[[plain]]] = StatementsJudge(model).judge([_task("A dog lies here now.")])
    assert plain.statements[0].log_odds is None


def test_what_cannot_be_asked_is_unread_and_ends_nothing():
    model = _Model()
    judge = StatementsJudge(model, with_log_odds=True)
    answers = (
        "A dog \x00 lies here.",
        "Half \ud83d a smile here.",
        "A <image> <image> dog is here.",
    )
    [[[nul, half, marks]]] = judge.judge([_task(*answers)])
    assert (nul.unread_verdicts, half.unread_verdicts, marks.unread_verdicts) == (1, 1, 0)
    assert len(model.asked[0]) == 1
    assert "<image>" not in model.asked[0][0]
    model = _Model(completion="A dog. => Is there a dog?")
    task = _task(*answers, prompt="<image> Describe.")
    [[[nul, half, marks]]] = ClaimsJudge(model).judge([task])
    assert (nul.unread_verdicts, half.unread_verdicts, marks.unread_verdicts) == (1, 1, 0)
    assert len(model.completed) == 1
    assert "<image>" not in model.completed[0]


def test_an_answer_that_cannot_be_split_is_unread():
    judge = StatementsJudge(_Model(), split=lambda prompt, answer: None)
    [[[found]]] = judge.judge([_task("noise")])
    assert (found.statements, found.unread_verdicts) == ((), 1)


def test_claims_are_split_by_the_model_and_nonsense_is_unread():
    reply = "Sure:\n1. A cat sits. => Is there a cat?\n- It is red => Is the cat red?\nno question"
    model = _Model("red", completion=reply)
    [[[found]]] = ClaimsJudge(model).judge([_task("A red cat.", prompt="Who?")])
    assert model.completed == [SPLIT_PROMPT.format(prompt="Who?", answer="A red cat.")]
    assert [(one.text, one.question, one.verdict) for one in found.statements] == [
        ("A cat sits.", "Is there a cat?", YES),
        ("It is red", "Is the cat red?", NO),
    ]
    [[[nonsense]]] = ClaimsJudge(_Model(completion="I cannot.")).judge([_task("A cat.")])
    assert nonsense.unread_verdicts == 1
    assert read_claims("a => Is it?\nb => Is it?") == [Claim("b", "Is it?", "is it?")]


@pytest.fixture(scope="module")
def truth():
    return AmberTruth(evaluation.FOLDER)


def test_truth_reads_annotations_in_ambers_layout(truth):
    annotated = next(one for one in truth._data.descriptions if one.hallu)
    present, absent = annotated.truth[0], annotated.hallu[0]
    answer = f"There is a {present} and a {absent}."
    [[[found]], [[unknown]]] = TruthJudge(truth).judge(
        [_task(answer, name=f"some/folder/{annotated.image}"), _task(answer, name="other.png")]
    )
    assert {one.text: one.verdict for one in found.statements} == {present: YES, absent: NO}
    assert unknown.unread == NOT_ANNOTATED


def test_truth_reads_yes_no_questions(truth):
    question = next(one for one in truth._data.questions if one.truth == "no")
    [[[right, wrong, neither]]] = TruthJudge(truth).judge(
        [_task("No.", "Yes", "Perhaps", prompt=question.text, name=question.image)]
    )
    assert (right.denied, wrong.denied, neither.unread_verdicts) == (0, 1, 1)
