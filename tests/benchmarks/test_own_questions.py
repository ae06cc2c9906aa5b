"""Questions of one's own: how a file is read, and its answers."""

import json

import pytest

from vlmdpo.benchmarks import registry, summary
from vlmdpo.benchmarks.own_questions import read_choice
from vlmdpo.config import EvalConfig
from vlmdpo.errors import DataError

YES_NO = ("yes", "no")
COLOURS = ("red", "dark red", "blue", "not clear")


def load(path):
    return registry.load("a file", EvalConfig(benchmark=str(path)))


def file_of(folder, *rows):
    path = folder / "mine.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


@pytest.mark.parametrize(
    ("answer", "choices", "read"),
    [
        ("Yes, it is.", YES_NO, "yes"),
        ("no", YES_NO, "no"),
        ("There is one.", YES_NO, None),
        ("Yes or no?", YES_NO, None),
        ("The circle is RED.", COLOURS, "red"),
        ("It is dark red", COLOURS, "dark red"),
        ("red or blue", COLOURS, None),
        ("It is not red", COLOURS, None),
        ("It isn't blue.", COLOURS, None),
        ("That is not clear.", COLOURS, "not clear"),
        ("reddish", COLOURS, None),
        ("", COLOURS, None),
    ],
)
def test_a_choice_is_read_without_guessing(answer, choices, read):
    assert read_choice(answer, choices) == read


def test_figures_are_by_group(tmp_path):
    colours = {"answer": "Red", "choices": ["red", "blue"], "group": "colour"}
    path = file_of(
        tmp_path,
        {"image": "1.png", "question": "A dog?", "answer": "yes", "group": "presence"},
        {"image": "1.png", "question": "A cat?", "answer": "No", "group": "presence"},
        {"image": "2.png", "question": "Which colour?", **colours, "id": "c"},
        "",
        {"image": "2.png", "question": "A cow?", "answer": "no"},
    )
    benchmark = load(path)
    assert [q.id for q in benchmark.questions] == [1, 2, "c", 5]
    assert [q.truth for q in benchmark.questions] == ["yes", "no", "red", "no"]
    [sheet] = benchmark.score([(1, "Yes"), (2, "Yes"), ("c", "It is red."), (5, "hm")])
    assert summary.scores([sheet]) == {
        "all": {"accuracy": 0.5, "f1": pytest.approx(2 / 3), "yes_ratio": pytest.approx(2 / 3)},
        "presence": {"accuracy": 0.5, "f1": pytest.approx(2 / 3), "yes_ratio": 1.0},
        "colour": {"accuracy": 1.0, "f1": None},
    }
    assert sheet.unread == [5]
    assert not benchmark.is_settled("Yes, ")  # colours may follow


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "A?", "answer": "yes"}, "line 1 lacks image"),
        ({"image": "1", "question": "A?", "answer": True}, "answer must be text, not True"),
        ({"image": "1", "question": "A?", "answer": "maybe"}, "'maybe' is none of yes, no; name"),
        (
            {"image": "1", "question": "A?", "answer": "red", "choices": ["blue", "green"]},
            "'red' is none of blue, green",
        ),
        (
            {"image": "1", "question": "A?", "answer": "red", "choices": ["red", "Red"]},
            "two or more different texts",
        ),
        ({"image": "1", "question": "A?", "answer": "red", "choices": "red"}, "a list of texts"),
        ({"image": "1", "question": "A?", "answer": "no", "group": 3}, "group must be text"),
        ({"image": "1", "question": "A?", "answer": "no", "group": " "}, "group is empty"),
        ({"image": "", "question": "A?", "answer": "no"}, "image is empty"),
        ({"image": "1", "question": " ", "answer": "no"}, "question is empty"),
        ({"image": "1", "question": "A?", "answer": "no", "id": 1.5}, "id must be a number or"),
        ("nonsense", "line 1 is not valid JSON"),
    ],
)
def test_a_wrong_line_is_named(row, says, tmp_path):
    with pytest.raises(DataError, match=says):
        load(file_of(tmp_path, row))


def test_a_file_without_questions_or_with_an_id_twice(tmp_path):
    with pytest.raises(DataError, match="holds no questions"):
        load(file_of(tmp_path))
    one = {"image": "1", "question": "A?", "answer": "no", "id": 2}
    with pytest.raises(DataError, match="line 2: id 2 is there twice"):
        load(file_of(tmp_path, one, one))
    with pytest.raises(DataError, match="cannot read"):
        load(tmp_path / "none.jsonl")


def test_answers_in_both_forms(tmp_path):
    one = {"image": "1", "question": "A?", "answer": "no"}
    benchmark = load(file_of(tmp_path, one, {**one, "question": "B?"}))
    (tmp_path / "a.json").write_text('[{"id": 2, "response": "No"}]')
    assert benchmark.read_answers(tmp_path / "a.json") == [(2, "No")]
    (tmp_path / "b.jsonl").write_text('{"answer": "Yes"}\n{"answer": "No"}\n')
    assert benchmark.read_answers(tmp_path / "b.jsonl") == [(1, "Yes"), (2, "No")]
    for text, says in (
        ('{"answer": "Yes"}\n', "has 1 answer without id, and there are 2 questions"),
        ('{"id": 7, "answer": "Yes"}\n', "there is no question 7"),
        ('{"id": 1, "answer": "Yes"}\n{"id": 1, "answer": "No"}', "question 1 is answered twice"),
        ('{"id": 1, "answer": "Yes"}\n{"answer": "No"}\n', "line 2 must be a JSON object with id"),
        ("[5, 6]", "must be a JSON object"),
    ):
        (tmp_path / "c.jsonl").write_text(text)
        with pytest.raises(DataError, match=says):
            benchmark.read_answers(tmp_path / "c.jsonl")
