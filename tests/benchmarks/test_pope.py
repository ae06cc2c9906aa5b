"""POPE and RePOPE: figures as their own scorers give them, files as users have them."""

import json

import pytest

from tests.support import pope_data
from vlmdpo.benchmarks import registry, summary
from vlmdpo.benchmarks.pope import evaluate_py, repope_rule
from vlmdpo.config import EvalConfig
from vlmdpo.errors import DataError

IMAGES = ("1.png", "2.png")
# As the scorers spell the figures.
SPELLINGS = {
    "accuracy": ("Accuracy", "ACC"),
    "precision": ("Precision",),
    "recall": ("Recall",),
    "f1": ("F1 score", "F1"),
    "yes_ratio": ("Yes ratio", "Yes Ratio"),
}


def load(folder, *, name="pope", split=(), **more):
    return registry.load(name, EvalConfig(benchmark=name, data=folder, split=split, **more))


def scored(benchmark, responses):
    return summary.scores(benchmark.score(responses))


@pytest.fixture(scope="module")
def repope(benchmark_data, tmp_path_factory):
    """RePOPE's label files, from POPE's and the list of what RePOPE says differently."""
    folder = tmp_path_factory.mktemp("repope")
    changes = json.loads((benchmark_data / "pope" / "repope_changes.json").read_text())
    for split, change in changes.items():
        lines = []
        for line in (benchmark_data / "pope" / f"coco_pope_{split}.json").read_text().splitlines():
            row = json.loads(line)
            number = row["question_id"]
            if number in change["removed"]:
                continue
            row["label"] = (
                "yes"
                if number in change["now_yes"]
                else "no"
                if number in change["now_no"]
                else row["label"]
            )
            lines.append(json.dumps(row))
        (folder / f"coco_repope_{split}.json").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("name", ["pope", "repope"])
def test_every_figure_is_the_official_one_to_the_last_digit(name, benchmark_data, repope):
    folder = benchmark_data / "pope"
    labels = "pope_labels" if name == "pope" else "repope_labels"
    places = (
        {"evaluate_py": (), "repope_rule_on_pope_labels": ("repope_rule",)}
        if name == "pope"
        else {"repope_rule_on_repope_labels": (), "evaluate_py_on_repope_labels": ("evaluate_py",)}
    )
    compared = 0
    for path in sorted((folder / "golden").glob("*.jsonl")):
        case, split = path.stem.split(".")
        golden = json.loads((folder / "golden" / f"{case}.figures.json").read_text())[split]
        benchmark = load(folder if name == "pope" else repope, name=name, split=(split,))
        found = scored(benchmark, benchmark.read_answers(path))
        for key, place in places.items():
            if "error" in golden[key]:  # a missing answer; the figures are then of the others
                continue
            figures = found
            for part in (*place, split):
                figures = figures[part]
            for figure, value in figures.items():
                [expected] = [golden[key][s] for s in SPELLINGS[figure] if s in golden[key]]
                assert value == expected, (labels, case, split, key, figure)
                compared += 1
    assert compared >= 45


def test_readings_are_those_of_the_scorers(benchmark_data):
    readings = json.loads((benchmark_data / "pope" / "golden" / "readings.json").read_text())
    for one in readings:
        assert evaluate_py(one["answer"]) == one["evaluate_py"]
        assert repope_rule(one["answer"]) == one["repope"]


@pytest.mark.parametrize(
    ("answer", "popes", "repopes"),
    [
        ("No", "no", "no"),
        ("NO", "yes", "no"),
        ("No\nThere is none.", "yes", "no"),
        ("Yes, but not in front.", "no", "yes"),
        ("There is no dog. Yes.", "no", "yes"),
        ("I see a snowman", "yes", "no"),
        ("A dog", "yes", None),
        ("", "yes", None),
    ],
)
def test_what_an_answer_is_taken_for(answer, popes, repopes):
    assert evaluate_py(answer) == popes
    assert repope_rule(answer) == repopes


def test_the_published_questions_are_recognized(benchmark_data):
    folder = benchmark_data / "pope"
    benchmark = load(folder)
    assert len(benchmark.questions) == 9000
    assert benchmark.title == "POPE"
    assert not any("published" in note or "old copy" in note for note in benchmark.notes)
    assert benchmark.published
    assert not load(folder, suffix="Answer in one word.").published


def test_the_mean_is_over_splits_and_intervals_draw_images(tmp_path):
    benchmark = load(pope_data.write(tmp_path / "pope", IMAGES))
    right = [(q.id, q.truth) for q in benchmark.questions]
    wrong_in_popular = [
        (number, "yes" if number.startswith("popular") else text) for number, text in right
    ]
    found = scored(benchmark, wrong_in_popular)
    assert found["random"]["accuracy"] == found["adversarial"]["accuracy"] == 1
    assert found["popular"]["accuracy"] == 0.5
    assert found["all"]["accuracy"] == pytest.approx(2.5 / 3)
    assert found["ours"]["all"]["accuracy"] == pytest.approx(2.5 / 3)
    [sheet] = benchmark.score(wrong_in_popular)
    assert set(sheet.images) == set(IMAGES)
    assert sheet.details["popular/2"] == {"read": "yes"}
    # Three yes questions and one no question an image are in several splits.
    assert sheet.is_repeat.sum() == len(IMAGES) * 2 * 4
    low, high = summary.intervals([sheet])["all"]["accuracy"]
    assert low == high == pytest.approx(2.5 / 3)  # both images are alike


def test_a_figure_that_a_scorer_cannot_give_is_left_out(tmp_path):
    benchmark = load(pope_data.write(tmp_path / "pope", IMAGES), split=("random",))
    found = scored(benchmark, [(q.id, "no") for q in benchmark.questions])
    assert found["random"] == {
        "accuracy": 0.5,
        "precision": None,
        "recall": 0.0,
        "f1": None,
        "yes_ratio": 0.0,
    }


def test_answers_join_by_id_or_by_their_order(tmp_path):
    folder = pope_data.write(tmp_path / "pope", IMAGES)
    benchmark = load(folder, split=("popular",))
    texts = [q.truth for q in benchmark.questions]
    by_id = pope_data.answers(tmp_path / "ids.jsonl", texts)
    in_order = pope_data.answers(tmp_path / "order.jsonl", texts, ids=False)
    lines = by_id.read_text().splitlines()
    (tmp_path / "turned.jsonl").write_text("\n".join(reversed(lines)))
    own = [{"id": q.id, "response": q.truth} for q in benchmark.questions]
    (tmp_path / "own.json").write_text(json.dumps(own))
    for path in (by_id, in_order, tmp_path / "turned.jsonl", tmp_path / "own.json"):
        assert scored(benchmark, benchmark.read_answers(path))["popular"]["accuracy"] == 1, path


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([{"answer": "yes"}] * 11, "has 11 answers without question_id, and the popular split 12"),
        ([{"question_id": 99, "answer": "yes"}], "there is no question 99 in the popular split"),
        ([{"question_id": 1, "answer": "yes"}, {"answer": "no"}], "1 of 2 answers have a question"),
        ([{"question_id": 1, "text": "yes"}], "line 1 lacks answer"),
        ([{"question_id": 1, "answer": None}], "line 1: answer must be text, not None"),
        ([{"question_id": "1", "answer": "no"}], "question_id must be a whole number, not '1'"),
        (
            [{"question_id": 1, "answer": "no", "question": "Is there a dog?"}],
            "answers to another split or benchmark",
        ),
        ([{"question_id": 1, "answer": "no"}, 5], "line 2 must be a JSON object"),
    ],
)
def test_answers_that_do_not_join_are_refused(content, says, tmp_path):
    benchmark = load(pope_data.write(tmp_path / "pope", IMAGES), split=("popular",))
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in content))
    with pytest.raises(DataError, match=says):
        benchmark.read_answers(path)


def test_old_copies_and_other_files_are_named(tmp_path):
    def misspell(split, row):
        row["text"] = row["text"].replace("image", "imange")

    folder = pope_data.write(tmp_path / "old", IMAGES, change=misspell)
    assert 'an old copy (12 questions, 12 with "imange")' in load(folder).notes[0]
    folder = pope_data.write(tmp_path / "other", IMAGES)
    assert "the published random split has 3,000" in load(folder).notes[0]
    many = [f"{i}.png" for i in range(500)]
    folder = pope_data.write(tmp_path / "many", many)
    assert "is not the published popular split" in load(folder, split=("popular",)).notes[0]
    with pytest.raises(DataError, match="as POPE's own files; RePOPE's random split has 2,774"):
        load(pope_data.write(tmp_path / "no", many, name="repope"), name="repope")
    with pytest.raises(DataError, match="as RePOPE's popular split: use --benchmark repope"):
        load(pope_data.write(tmp_path / "re", many, count=2727), split=("popular",))
    with pytest.raises(DataError, match="holds the questions of the popular split, not of random"):
        load(pope_data.write(tmp_path / "x", many, name="repope", count=2727), name="repope")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match=r"folder '.*nowhere' does not exist"):
        load(tmp_path / "nowhere")
    folder = pope_data.write(tmp_path / "pope", IMAGES)
    popular = folder / "coco_pope_popular.json"
    with pytest.raises(DataError, match="is a file; name its folder"):
        load(popular)
    popular.rename(folder / "my-popular.jsonl")
    assert len(load(folder).questions) == 36
    (folder / "a-popular.json").write_text("")
    with pytest.raises(DataError, match=r"a-popular.json, my-popular.jsonl may be it"):
        load(folder)
    (folder / "my-popular.jsonl").unlink()
    with pytest.raises(DataError, match="holds no questions"):
        load(folder)
    assert len(load(folder, split=("random",)).questions) == 12

    def as_popev2(split, row):
        row["label"] = row["label"].capitalize()

    with pytest.raises(DataError, match="must be yes or no, not 'Yes'; POPEv2 is another"):
        load(pope_data.write(tmp_path / "v2", IMAGES, change=as_popev2))
    (folder / "a-popular.json").write_text('{"question_id": 1}')
    with pytest.raises(DataError, match=r"a-popular.json' line 1 lacks image"):
        load(folder)
