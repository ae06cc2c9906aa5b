"""The prompt that is asked and the prompt that is trained are compared on a real row."""

import pytest

from tests.support.engines import pairs, trainer
from vlmdpo.data.pairs import message
from vlmdpo.engine import collate, generate
from vlmdpo.models import rendering
from vlmdpo.training.prompt_check import check_prompts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return trainer("llava", "shared", pairs(2), tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("engine", ["shared", "rows"])
def test_they_are_the_same(made, engine):
    made.use_engine(engine)
    check = check_prompts(made, made.train_dataset[0])
    assert check.passed, check
    assert check.seen.endswith("tokens; the loss covers the answers alone")


def test_another_prompt_is_found(made, monkeypatch):
    monkeypatch.setattr(
        generate,
        "render_question",
        lambda processor, question: rendering.render_question(processor, f"{question}!"),
    )
    check = check_prompts(made, made.train_dataset[0])
    assert check.passed is False
    assert check.seen.startswith("they differ from token ")


def test_a_header_in_the_loss_is_found(made, monkeypatch):
    monkeypatch.setattr(
        collate,
        "render_answer",
        lambda processor, text: "header: " + rendering.render_answer(processor, text),
    )
    check = check_prompts(made, made.train_dataset[0])
    assert check.passed is False
    assert "the chosen answer's loss covers 'header: c" in check.seen


def test_a_row_that_infer_cannot_ask(made):
    row = dict(made.train_dataset[0])
    row["prompt"] = [message("system", "s"), *row["prompt"]]
    assert check_prompts(made, row).passed is None
