"""Votes: a file that prepare reads, in which the last vote on a pair of answers stays."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from vlmdpo.benchmarks.stats import wilson
from vlmdpo.data.reasons import BadImage
from vlmdpo.engine.side_by_side import Answer, AnswerScore
from vlmdpo.web import panes
from vlmdpo.web.examples import Example
from vlmdpo.web.votes import Tally, VoteFile
from vlmdpo.web.voting import Session, Voting

EVIL = "<img src=x onerror=alert(1)> ${alert(2)} <b>"


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "p.png")
    return tmp_path / "p.png"


class Models:
    """Answers "yes" and "no", or what they are told."""

    model = processor = None
    beta = 0.1
    is_closed = False
    in_one_batch = True

    def __init__(self, base="yes", tuned="no"):
        self.said = Answer((1,), base), Answer((2,), tuned)

    def stream(self, *_):
        yield Answer((1,), self.said[0].text[:1]), Answer()
        yield self.said

    def score(self, *_):
        return AnswerScore(1, -1.0, -2.0, -0.1), AnswerScore(1, -2.0, -1.0, 0.1)


def voting(monkeypatch, models=None, examples=(), **options):
    monkeypatch.setattr("vlmdpo.engine.generate.model_inputs", lambda *_: None)
    names = ("base-model", "tuned-model")
    file = VoteFile(Path("votes/v.jsonl"), names)
    made = Voting(models or Models(), names, examples, file, 8, **options)
    made._random = random.Random(0)
    return made


def asked(page, picture, session=None):
    *_, view = page.ask(page.token, session or Session(), str(picture), "Is it?")
    return view


def lines(name="v"):
    path = Path(f"votes/{name}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_nothing_tells_the_models_apart_before_the_vote(monkeypatch, picture):
    page = voting(monkeypatch)
    orders = set()
    for _ in range(20):
        for view in page.ask(page.token, Session(), str(picture), "Is it?"):
            shown = "".join(view.panes) + view.scores
            assert "Left" in shown
            assert not any(word in shown for word in ("base", "tuned", "model", "log-prob"))
        orders.add(view.session.exchange.order)
    assert orders == {("base", "tuned"), ("tuned", "base")}
    side = panes.SIDES[view.session.exchange.order.index("tuned")]
    after = page.vote(page.token, view.session, side)
    shown = "".join(after.panes)
    assert "tuned: tuned-model ✓ preferred" in shown
    assert "base: base-model<" in shown
    assert "Reward margin" in after.scores
    assert [(line["chosen"], line["rejected"]) for line in lines()] == [("no", "yes")]


def test_answers_that_come_one_after_the_other_are_hidden_until_both_are_there(
    monkeypatch, picture
):
    models = Models()
    models.in_one_batch = False
    page = voting(monkeypatch, models)
    *growing, last = page.ask(page.token, Session(), str(picture), "Is it?")
    assert all("yes" not in "".join(view.panes) for view in growing)
    assert "yes" in "".join(last.panes)


def test_with_names_shown_base_is_left_and_tuned_first_on_a_phone(monkeypatch, picture):
    view = asked(voting(monkeypatch, is_blind=False), picture)
    assert "base: base-model" in view.panes[0]
    assert 'class="pane tuned"' in view.panes[1]
    assert "Reward margin" in view.scores


def test_the_last_vote_on_a_pair_of_answers_stays(monkeypatch, picture):
    page = voting(monkeypatch)
    for _ in range(3):
        for choice in ("left", "right", "tie", "left"):
            page.vote(page.token, asked(page, picture).session, choice)
    assert len(lines()) == 1
    assert lines("v.ties") == []
    page.vote(page.token, asked(page, picture).session, "tie")
    assert lines() == []
    assert len(lines("v.ties")) == 1
    assert page.file.tally() == Tally(ties=1)
    assert len(list(Path("votes/images").iterdir())) == 1, "an image is stored once"


def test_undo_takes_the_last_vote_back_and_asks_again(monkeypatch, picture):
    page = voting(monkeypatch)
    view = page.vote(page.token, asked(page, picture).session, "left")
    assert page.votes == 1
    view = page.undo(page.token, view.session)
    assert (lines(), page.votes) == ([], 0)
    assert view.can_choose
    assert view.session.exchange is not None
    view = page.vote(page.token, view.session, "right")
    assert page.votes == 1
    view = page.undo(page.token, page.undo(page.token, view.session).session)
    assert "no vote of this page" in view.status


def test_votes_of_other_pages_and_programs_stay(monkeypatch, picture):
    page = voting(monkeypatch)
    Path("votes").mkdir()
    other = '{"image": "x.png", "question": "q", "chosen": "a", "rejected": "b"}\nnot json\n'
    Path("votes/v.jsonl").write_text(other + '{"image": "cut by a ki')
    view = page.vote(page.token, asked(page, picture).session, "left")
    text = Path("votes/v.jsonl").read_text()
    assert text.startswith(other)
    assert len(text.splitlines()) == 3
    page.undo(page.token, view.session)
    assert Path("votes/v.jsonl").read_text() == other


def test_an_answer_of_ones_own_is_preferred_to_both(monkeypatch, picture):
    page = voting(monkeypatch)
    session = asked(page, picture).session
    assert "differs from these two" in page.vote(page.token, session, "neither", "yes").status
    page.vote(page.token, session, "neither", "perhaps")
    assert [(line["chosen"], line["rejected"]) for line in lines()] == [
        ("perhaps", "no"),
        ("perhaps", "yes"),
    ]
    assert page.file.tally() == Tally(neither=1)


def test_a_vote_needs_the_token_of_this_start(monkeypatch, picture):
    page = voting(monkeypatch)
    session = asked(page, picture).session
    for token in ("", None, "x" * 22):
        assert "reload it" in page.vote(token, session, "left").status
        assert "reload it" in page.undo(token, session).status
        assert "reload it" in next(page.ask(token, session, str(picture), "q")).status
        assert "reload it" in next(page.ask_next(token, session))[1].status
    assert lines() == []


def test_questions_and_votes_that_cannot_be_taken_are_explained(monkeypatch, picture, tmp_path):
    page = voting(monkeypatch)

    def status(*what):
        *_, view = page.ask(page.token, Session(), *what)
        assert view.session.exchange is None
        return view.status

    assert "Choose an image" in status(None, "q")
    assert "Choose an image" in status(str(picture), "  ")
    (tmp_path / "no.png").write_text("no picture")
    assert "cannot be used" in status(str(tmp_path / "no.png"), "q")
    assert "2,000 characters" in status(str(picture), "x" * 2001)

    def refuses(*_):
        raise ValueError("too narrow")

    monkeypatch.setattr("vlmdpo.engine.generate.model_inputs", refuses)
    assert "cannot be asked: too narrow" in status(str(picture), "q")
    assert page.vote(page.token, Session(), "left").status == "Ask first."
    empty = voting(monkeypatch, Models("yes", ""))
    session = asked(empty, picture).session
    assert "empty answer" in empty.vote(empty.token, session, "left").status
    same = asked(voting(monkeypatch, Models("yes", "yes")), picture)
    assert (same.can_choose, same.can_answer) == (False, True)
    Path("votes").mkdir(exist_ok=True)
    Path("votes/images").write_text("in the way")
    page = voting(monkeypatch)
    assert "Not written" in page.vote(page.token, asked(page, picture).session, "left").status
    assert page.votes == 0


def test_examples_are_gone_through_once_and_progress_is_kept(monkeypatch, tmp_path):
    examples = []
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (9, 9), colour).save(tmp_path / f"{number}.png")
        examples.append(Example(tmp_path / f"{number}.png", f"q{number}", "mine"))
    page = voting(monkeypatch, examples=examples)
    assert page.progress().startswith("3 examples, 0 voted on.")
    session, seen = Session(), []
    for choice in ("left", None, "tie"):  # None skips
        *_, (example, view) = page.ask_next(page.token, session)
        seen.append(example.question)
        session = page.vote(page.token, view.session, choice).session if choice else view.session
    assert seen == ["q0", "q1", "q2"]
    assert page.progress(2).startswith("Example 3 of 3, 2 voted on.")
    # A new start of the server knows what was voted on.
    again = voting(monkeypatch, examples=examples)
    *_, (example, view) = again.ask_next(again.token, Session())
    assert example.question == "q1"
    again.vote(again.token, view.session, "right")
    *_, (example, view) = again.ask_next(again.token, Session())
    assert (example, view.status) == (None, "All examples are voted on.")


def test_what_models_say_is_shown_as_text(monkeypatch, picture):
    page = voting(monkeypatch, Models(EVIL, EVIL + "!"))
    views = list(page.ask(page.token, Session(), str(picture), "q"))
    views.append(page.vote(page.token, views[-1].session, "left"))
    for view in views:
        assert "<img" not in "".join(view.panes)
        assert "<b>" not in "".join(view.panes)
    assert "&lt;img" in view.panes[0]


def test_an_unreadable_image_is_not_written(tmp_path):
    (tmp_path / "no.png").write_text("no")
    with pytest.raises(BadImage):
        VoteFile(Path("v.jsonl"), ("a", "b")).cast(tmp_path / "no.png", "?", [("a", "b")], "base")
    assert not Path("v.jsonl").exists()


@pytest.mark.parametrize(
    ("part", "whole", "low", "high"), [(7, 10, 39.7, 89.2), (0, 5, 0.0, 43.4), (5, 5, 56.6, 100.0)]
)
def test_the_interval_is_wilsons(part, whole, low, high):
    assert wilson(part, whole) == pytest.approx((low, high), abs=0.05)


def test_the_tally_in_words():
    assert panes.tally_sentence(Tally()) == "No vote for either model yet."
    said = panes.tally_sentence(Tally(base=3, tuned=7, ties=2, neither=1))
    assert said == (
        "Tuned preferred in 7 of 10 decided votes: 70% (95% interval 40 to 89%). 2 ties, "
        "1 for neither."
    )
