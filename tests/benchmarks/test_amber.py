"""AMBER: the official scores to the digit, answers read without guessing, and their uncertainty."""

import json

import numpy as np
import pytest

from vlmdpo.benchmarks.amber import questions as qs
from vlmdpo.benchmarks.amber.scores import score
from vlmdpo.benchmarks.stats import compare
from vlmdpo.benchmarks.verdict import is_settled, verdict
from vlmdpo.errors import DataError

SPELT = {
    "Descriminative Task": "Discriminative",
    "Exsitence": "Existence",
}  # as AMBER's scorer prints them


@pytest.mark.parametrize("case", ["always_no", "always_yes", "perfect", "rand1_acc86"])
def test_golden_cases_to_the_digit(case, amber_data, vlmdpo):
    code, out, _ = vlmdpo(
        "eval-amber",
        "--data",
        amber_data,
        "--answers",
        amber_data / "golden" / f"{case}.json",
        "--json",
    )
    assert code == 0
    scores = json.loads(out)["scores"]["base"]
    checked = 0
    for kind in ("d", "de", "da", "dr"):
        official = json.loads((amber_data / "golden" / f"{case}.{kind}.out.json").read_text())
        for name, figures in official.items():
            assert scores[SPELT.get(name, name)] == {
                key.lower(): value for key, value in figures.items()
            }, name
            checked += 1
    assert checked == 13


def test_real_amber_stands_beside_the_article(amber_data, vlmdpo):
    answers = amber_data / "golden" / "rand1_acc86.json"
    code, out, _ = vlmdpo("eval-amber", "--data", amber_data, "--answers", answers)
    assert code == 0
    assert "GPT-4o" in out
    assert "VCD" in out
    assert "always No: accuracy 66.3, F1 79.7" in out


def _question(number, dimension="State", truth="no", image="a.png"):
    return qs.Question(number, image, "?", dimension, truth)


def test_only_exact_words_count_and_duplicates_count_twice():
    by_id = {1: _question(1), 2: _question(2, truth="yes"), 3: _question(3)}
    figures = score(by_id, [(1, "No"), (1, "No"), (2, "yes"), (2, "Yes.")])["State"]
    assert figures["accuracy"] == 50.0  # question 3 has no response and is not counted
    assert (figures["precision"], figures["recall"]) == (100.0, 100.0)
    assert "Relation" not in score(by_id, [(1, "No")])


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes", "Yes"),
        ("no.", "No"),
        ("No, there is no ship", "No"),
        (' "Yes," it is', "Yes"),
        ("**No**", "No"),
        ("YES!", "Yes"),
        ("Nothing", None),
        ("Not sure", None),
        ("I think yes", None),
        ("no-one is there", None),
        ("“Yes”, it is", "Yes"),
        ("`No`", "No"),
        ("- Yes", "Yes"),
        ("Yes or no", None),
        ("Yes/No", None),
        ("no / yes?", None),
        ("Yes, no doubt", "Yes"),
        ("Yes order", "Yes"),
        ("YE\u017f", None),  # a long s
        ("Nový", None),
        ("", None),
    ],
)
def test_verdict_never_guesses(answer, read):
    assert verdict(answer) == read


@pytest.mark.parametrize(
    "answer", ["Yes.", "No, it", "yes it is", "**No**", "No\nBecause", "Yes o'"]
)
def test_a_settled_verdict_stays(answer):
    assert is_settled(answer)
    assert all(verdict(answer + more) == verdict(answer) for more in ("", " or no", "/No", "r no"))


@pytest.mark.parametrize(
    "answer", ["", "Y", "Yes", "No ", "Yes or", "no/", "Yes / N", "No o", "Not"]
)
def test_a_verdict_that_may_change_is_not_settled(answer):
    assert not is_settled(answer)


def test_comparison_is_the_exact_one():
    base = [True] * 50 + [False] * 12 + [True] * 3
    tuned = [True] * 50 + [True] * 12 + [False] * 3
    found = compare(base, tuned, [f"{i}" for i in range(65)])
    assert (found.fixed, found.broken) == (12, 3)
    assert found.delta_accuracy == pytest.approx(100 * 9 / 65)
    assert found.mcnemar_p == pytest.approx(0.03515625)  # 2 * P(X <= 3), X ~ Binomial(15, 1/2)
    assert found.ci95[0] < found.delta_accuracy < found.ci95[1]
    assert compare(base, base, ["a"] * 65).mcnemar_p == 1.0


def test_interval_is_wider_if_one_image_decides():
    rng = np.random.default_rng(0)
    gain_of_image = rng.random(40) < 0.5
    base, tuned = [False] * 400, [bool(gain_of_image[i // 10]) for i in range(400)]
    clustered = compare(base, tuned, [f"{i // 10}" for i in range(400)])
    independent = compare(base, tuned, [f"{i}" for i in range(400)])
    width = [found.ci95[1] - found.ci95[0] for found in (clustered, independent)]
    assert width[0] > 2 * width[1]


def _folder(tmp_path, queries, annotations):
    (tmp_path / "query").mkdir()
    (tmp_path / "query" / "query_discriminative.json").write_text(json.dumps(queries))
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    return tmp_path


_QUERY = {"id": 5, "image": "a.png", "query": "Is it?"}


@pytest.mark.parametrize(
    ("queries", "annotations", "says"),
    [
        ([_QUERY], [{"id": 6, "type": "relation", "truth": "no"}], "question 5 has no entry"),
        (
            [_QUERY],
            [{"id": 5, "type": "relation", "truth": "maybe"}],
            "annotation 5 is not of a yes/no question",
        ),
        ([{"id": 5}], [], "entry 0 .* lacks image, query"),
        ({"id": 5}, [], "must hold a JSON list"),
        ([], [], "contains no questions"),
    ],
)
def test_data_that_does_not_join_is_refused(queries, annotations, says, tmp_path):
    with pytest.raises(DataError, match=says):
        qs.read(_folder(tmp_path, queries, annotations))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[{"id": 5, "response": 1}]', "must be {'id': number, 'response': text}"),
        ('[{"id": 99, "response": "No"}]', "there is no question 99"),
        ('[{"id": 5}]', "lacks response"),
        ("[]", "answers none"),
        ("[", "not valid JSON"),
    ],
)
def test_bad_answer_files(content, says, tmp_path, vlmdpo):
    data = _folder(tmp_path, [_QUERY], [{"id": 5, "type": "relation", "truth": "no"}])
    (tmp_path / "answers.json").write_text(content)
    code, _, err = vlmdpo("eval-amber", "--data", data, "--answers", tmp_path / "answers.json")
    assert code == 3
    assert says in err


def test_a_folder_without_its_images_is_refused_before_a_model_is_loaded(tmp_path, vlmdpo):
    data = _folder(tmp_path, [_QUERY], [{"id": 5, "type": "relation", "truth": "no"}])
    (tmp_path / "image").mkdir()
    code, _, err = vlmdpo("eval-amber", "--data", data, "--model", "nobody/nothing")
    assert code == 3
    assert "lacks all of 1 image (a.png ...)" in err
    code, _, err = vlmdpo("eval-amber", "--data", tmp_path / "absent")
    assert (code, "cannot read" in err) == (3, True)


_DESCRIBE = {"id": 1, "image": "a.png", "query": "Describe this image."}
_TRUTH = {"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["sea"]}


@pytest.mark.parametrize(
    ("described", "truth", "relation", "safe", "says"),
    [
        ([_DESCRIBE], _TRUTH, {"sky": [], "sea": []}, None, "cannot read .*safe_words.txt"),
        ([_DESCRIBE], _TRUTH, None, "", "cannot read .*relation.json"),
        ([_DESCRIBE], _TRUTH, {"sky": "sea"}, "", "JSON object of lists of words"),
        ([_DESCRIBE], _TRUTH, {"sky": []}, "", "names 'sea', which is not in relation.json"),
        (
            [_DESCRIBE],
            {**_TRUTH, "truth": "sky"},
            {"sky": [], "sea": []},
            "",
            "lists of words as truth and hallu",
        ),
        (
            [{**_DESCRIBE, "id": 2}],
            _TRUTH,
            {"sky": [], "sea": []},
            "",
            "question 2 has no generative entry",
        ),
        (
            [{**_DESCRIBE, "id": 5}],
            _TRUTH,
            {"sky": [], "sea": []},
            "",
            "question 5 has no generative entry",
        ),
    ],
)
def test_a_generative_half_that_does_not_join_is_refused(
    described, truth, relation, safe, says, tmp_path
):
    folder = _folder(tmp_path, [_QUERY], [{"id": 5, "type": "relation", "truth": "no"}, truth])
    (folder / "query" / "query_generative.json").write_text(json.dumps(described))
    if relation is not None:
        (folder / "relation.json").write_text(json.dumps(relation))
    if safe is not None:
        (folder / "safe_words.txt").write_text(safe)
    with pytest.raises(DataError, match=says):
        qs.read(folder)
    assert len(qs.read(folder, generative=False).questions) == 1, (
        "its other half can be used all the same"
    )


def test_real_amber_has_the_defects_that_the_docs_name(amber_data):
    benchmark = qs.read(amber_data)
    things = {description.image: description.truth for description in benchmark.descriptions}
    existence = [q for q in benchmark.questions if q.dimension == "Existence"]
    assert {q.truth for q in existence} == {"no"}

    def named(question):
        return (
            question.text.removeprefix("Is there ").split(" ", 1)[1].removesuffix(" in this image?")
        )

    assert sum(named(q) in things[q.image] for q in existence) == 63
    asked = [(q.image, q.text) for q in benchmark.questions]
    assert len(asked) - len(set(asked)) == 10
    odd = next(q for q in benchmark.questions if q.id == 13193)
    assert named(odd) in benchmark.vocabulary.association["sofa"]
    assert "sofa" in things[odd.image]
    lists = [(d.truth, d.hallu) for d in benchmark.descriptions]
    assert sum(len(set(truth)) < len(truth) for truth, _ in lists) == 14
    assert sum(len(set(hallu)) < len(hallu) for _, hallu in lists) == 6
    assert sum(bool(set(truth) & set(hallu)) for truth, hallu in lists) == 61
