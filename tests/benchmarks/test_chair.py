"""CHAIR: the golden cases, the two scorers, which images are asked, and what is said of them."""

import json
import os
from pathlib import Path

import pytest

from tests.support import coco, nltk_data
from vlmdpo.benchmarks import summary
from vlmdpo.benchmarks.chair import benchmark, mentions, pattern, wordnet
from vlmdpo.config import EvalConfig
from vlmdpo.errors import ConfigError, DataError, MissingDependencyError


@pytest.fixture(scope="module")
def golden():
    """CHAIR's golden cases, in the folder that VLMDPO_BENCHMARK_DATA names."""
    folder = os.environ.get("VLMDPO_BENCHMARK_DATA")
    if not folder:
        pytest.skip("VLMDPO_BENCHMARK_DATA names no folder with CHAIR's golden cases")
    return Path(folder) / "chair"


IMAGES = {
    1: (["dog", "bus"], ["A dog waits for a bus.", "A woman with her dogs."]),
    2: ([], ["Three cats on a sofa."]),
    3: (["person"], []),
    4: ([], []),
}


@pytest.fixture
def data(tmp_path):
    return coco.write(tmp_path / "annotations", IMAGES)


def load(data, **options):
    return benchmark.load(EvalConfig(benchmark="chair", data=data, **options))


def scored(chair, responses):
    (sheet,) = chair.score(responses)
    return sheet


def figures(sheet):
    return {name: figure.number for name, figure in sheet.groups["all"].items()}


def write_captions(path, captions):
    path.write_text("".join(json.dumps({"image_id": i, "caption": c}) + "\n" for i, c in captions))
    return path


SCORERS = ("pattern", "wordnet")
OFFICIAL = {"chair_s": "CHAIRs", "chair_i": "CHAIRi", "recall": "Recall", "len": "Len"}


@pytest.mark.parametrize("name", ["careful", "dreamer", "traps"])
@pytest.mark.parametrize("scorer", SCORERS)
def test_golden_cases_are_met_to_the_last_digit(golden, scorer, name):
    answers = golden / "golden" / f"{name}.jsonl"
    try:
        chair = load(golden / "annotations", answers=answers, scorer=scorer)
    except MissingDependencyError as problem:
        pytest.skip(f"nltk's data are not here: {problem}")
    responses = chair.read_answers(answers)
    official = json.loads((golden / "golden" / f"{name}.figures.json").read_text())[scorer]
    assert figures(scored(chair, responses)) == {
        key: official[named] for key, named in OFFICIAL.items()
    }
    expected = json.loads((golden / "golden" / f"{name}.{scorer}.sentences.json").read_text())
    for (number, text), one in zip(responses, expected, strict=True):
        found = mentions.read(text, chair.scorer)
        assert (found.words, [category for _, category in found.mentions]) == (
            one["words"],
            one["mentioned"],
        ), text
        (sheet,) = chair.score([(number, text)])
        assert sheet.details[number]["hallucinated"] == one["hallucinated"], text
    truths = json.loads((golden / "golden" / "ground_truth.json").read_text())
    for truth in truths:
        if truth["image_id"] in chair.truths:
            assert sorted(chair.truths[truth["image_id"]]) == truth[scorer]


@pytest.mark.parametrize(
    ("caption", "words", "categories"),
    [
        ("A bus and two buses.", 6, ["bus"]),  # the singulariser makes "bu" of a bus
        ("The baby elephant wears a bow tie.", 6, ["elephant", "tie"]),
        ("The seat of the toilet seat", 5, ["toilet"]),
        ("A hot dog, a hot-dog; home plate", 7, ["hot dog"]),
        ("DOGS DOGS dog", 3, ["dog", "dog", "dog"]),
        ('A dog.A cat. A "dog." A cat.', 12, ["cat", "dog", "cat"]),
        ("By 3 p.m. the dog. A cat", 8, ["dog", "cat"]),
        ("\n", 0, []),
    ],
)
def test_the_rules_of_the_original(caption, words, categories):
    found = mentions.read(caption, pattern.make())
    assert [category for _, category in found.mentions] == categories
    assert found.words == words


def test_sentences_end_as_nltks_do_where_it_knows_abbreviations():
    assert pattern.sentences('a dog. a "cat." st. paul at 3 p.m. (a bus!) it\'s. so? yes') == [
        *("a dog.", 'a "cat."', "st. paul at 3 p.m. (a bus!)", "it's.", "so?", "yes")
    ]


@pytest.fixture
def words_for_nltk(tmp_path):
    """nltk's own tools with data of a few words."""
    folder = nltk_data.write(
        tmp_path / "nltk_data",
        tags={"a": "DT", "is": "VBZ", "tied": "VBN", "potted": "VBD", "red": "JJ", "quickly": "RB"},
        lemmas={"noun": ["bus", "dog", "tie", "bear"], "verb": ["tie", "be"]},
        exceptions={"verb": {"tied": "tie", "is": "be"}},
    )
    with nltk_data.used(folder):
        yield


def test_wordnet_takes_the_lemma_of_the_part_of_speech(words_for_nltk):
    """Unlike the original's: a bus counts, and so does the verb "tied", as a tie."""
    scorer = wordnet.make()
    assert scorer.words("A red bus is tied quickly to Dogs.") == [
        *("a", "red", "bus", "be", "tie", "quickly", "to", "dog", ".")
    ]
    found = mentions.read("A bus is tied to two teddy bears.", scorer)
    assert found.mentions == (("bus", "bus"), ("tie", "tie"), ("teddy bear", "teddy bear"))
    assert mentions.read("A bus is tied.", pattern.make()).mentions == ()


def test_wordnet_without_its_data_is_refused_before_coco_is_read(data, tmp_path):
    with (
        nltk_data.used(tmp_path / "empty"),
        pytest.raises(MissingDependencyError, match="or use --scorer pattern"),
    ):
        load(data, scorer="wordnet")
    assert not (tmp_path / "cache").exists()


def test_truth_is_boxes_and_references(data):
    truths = load(data).truths
    assert truths == {
        1: {"dog", "bus", "person"},
        2: {"cat", "couch"},
        3: {"person"},
        4: frozenset(),
    }


def test_figures_and_details_by_hand(data):
    chair = load(data)
    sheet = scored(chair, [(1, "A dog, a cat and a dog."), (4, "Nothing."), (2, "A sofa.")])
    assert figures(sheet) == {
        "chair_s": 1 / 3,
        "chair_i": 1 / 4,
        "recall": 2 / 5,  # dog and couch of dog, bus, person, cat, couch
        "len": (9 + 2 + 3) / 3,
    }
    assert sheet.details[1] == {
        "mentioned": ["dog", "cat", "dog"],
        "hallucinated": [["cat", "cat"]],
        "truth": ["bus", "dog", "person"],
    }
    assert sheet.images == [f"COCO_val2014_{i:012d}.jpg" for i in (1, 4, 2)]
    assert {n: f.more_is_better for n, f in sheet.groups["all"].items()} == {
        **{"chair_s": False, "chair_i": False, "recall": True, "len": None}
    }


def test_a_repeated_id_counts_twice_and_so_does_its_truth(data):
    sheet = scored(load(data), [(3, "A man."), (3, "A dog.")])
    assert figures(sheet) == {"chair_s": 0.5, "chair_i": 0.5, "recall": 0.5, "len": 3.0}


def test_figures_that_are_divided_by_zero_are_none(data):
    chair = load(data)
    assert figures(scored(chair, [(4, ""), (4, "Nothing here.")])) == {
        **{"chair_s": 0.0, "chair_i": None, "recall": None, "len": 1.5}
    }
    assert list(chair.score([])) == []
    report = summary.summarize(chair, {"base": [(4, "")]}, {"base": {4: ""}})
    assert report["scores"]["base"]["all"]["chair_i"] is None
    assert report["intervals"]["base"]["all"]["recall"] is None


def test_ids_in_no_file_are_counted_and_said(data, tmp_path):
    answers = write_captions(tmp_path / "a.jsonl", [(77, "A dog."), (1, "A dog."), (77, "Cats.")])
    chair = load(data, answers=answers)
    assert figures(scored(chair, chair.read_answers(answers)))["chair_i"] == 2 / 3
    assert chair.notes[1].startswith(f"1 image id in '{answers}' is in none of COCO's files")
    assert [one.id for one in chair.descriptions] == [77, 1]
    with pytest.raises(DataError, match=r"no id in .* is of an image in COCO.s .*such as 77"):
        load(data, answers=write_captions(tmp_path / "a.jsonl", [(77, "A dog."), (78, "Cats.")]))


def test_images_are_drawn_by_seed_and_a_smaller_draw_lies_in_a_larger(tmp_path):
    data = coco.write(tmp_path / "many", {i: (["dog"], ["A dog."]) for i in range(1, 41)})

    def ids(**options):
        return [one.id for one in load(data, **options).descriptions]

    assert ids(sample=5) == ids(sample=9)[:5]
    assert ids(sample=5) != ids(sample=5, seed=1)
    assert sorted(ids()) == list(range(1, 41))
    assert "which are all of this folder's 40" in load(data).notes[1]
    assert load(data, sample=5, prompt="Say it.").descriptions[0].text == "Say it."


@pytest.mark.parametrize("text", ["3\n\n1\n", "[3, 1]"])
def test_ids_from_a_file(data, tmp_path, text):
    (tmp_path / "ids").write_text(text)
    chair = load(data, ids=tmp_path / "ids")
    assert [(one.id, one.image) for one in chair.descriptions] == [
        *((3, "COCO_val2014_000000000003.jpg"), (1, "COCO_val2014_000000000001.jpg"))
    ]
    assert len(chair.notes) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1\nCOCO_val2014_1.jpg\n", "line 2 must be one of COCO's image ids"),
        ('[1, "3"]', "must list COCO's image ids, not '3'"),
        ("[true]", "not True"),
        ("[]", "lists no id"),
        ("", "lists no id"),
        ("[1, 3, 1]", "lists 1 more than once"),
        ("1\n50\n51\n", r"lists 2 ids of no image .* such as 50"),
        ("[1", "is not valid JSON"),
    ],
)
def test_ids_that_are_none_are_refused(data, tmp_path, text, said):
    (tmp_path / "ids").write_text(text)
    with pytest.raises(DataError, match=said):
        load(data, ids=tmp_path / "ids")


def test_choices_of_images_that_would_have_no_effect_are_refused(data, tmp_path):
    (tmp_path / "ids").write_text("1")
    answers = write_captions(tmp_path / "a.jsonl", [(1, "A dog.")])
    for choice in ({"ids": tmp_path / "ids"}, {"sample": 1}, {"seed": 3}):
        with pytest.raises(ConfigError, match="--answers scores every caption"):
            load(data, answers=answers, **choice)
    with pytest.raises(ConfigError, match="--seed draws images, but --ids names them"):
        load(data, ids=tmp_path / "ids", seed=3)


@pytest.mark.parametrize(
    "text",
    [
        '[{"image_id": 1, "caption": "A dog.", "model": "x"}, {"image_id": 2, "caption": ""}]',
        '{"image_id": 1, "caption": "A dog."}\n\n{"caption": "", "image_id": 2}\n',
        '[{"id": 1, "response": "A dog.", "said": "A dog."}, {"id": 2, "response": ""}]',
    ],
    ids=["list", "lines", "answers of vlmdpo"],
)
def test_forms_of_a_file_of_captions(data, tmp_path, text):
    (tmp_path / "a").write_text(text)
    assert load(data).read_answers(tmp_path / "a") == [(1, "A dog."), (2, "")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"image_id": "1", "caption": "x"}]', r"entry 0 .*: image_id must be a whole number"),
        ('{"image_id": 1}\n', "line 1 lacks caption"),
        ('{"question_id": 1, "answer": "Yes"}\n', "line 1 lacks image_id"),
        ("[3]", "must be an object"),
        ("[]", "holds no caption"),
        ('{"image_id": 1, "caption": "x"', "line 1 is not valid JSON"),
    ],
)
def test_files_that_hold_no_captions_are_refused(data, tmp_path, text, said):
    (tmp_path / "a").write_text(text)
    with pytest.raises(DataError, match=said):
        load(data, answers=tmp_path / "a")


def test_the_prompt_is_part_of_the_data_and_the_scorer_of_the_title(data):
    assert load(data).digest != load(data, prompt="Say it.").digest
    assert load(data).title == "CHAIR (pattern)"


def test_a_model_is_asked_and_its_captions_score_alike(data, tmp_path, vlmdpo):
    images = coco.draw_images(tmp_path / "val2014", [1, 2, 3])
    code, out, err = vlmdpo(
        *("eval", "--benchmark", "chair", "--data", data, "--images", images, "--json"),
        *("--max-description-tokens", 4, "--output-dir", tmp_path / "out"),
    )
    assert code == 0, err
    asked = json.loads(out)
    assert "1 of 4 images are missing: COCO_val2014_000000000004.jpg" in err
    assert asked["coverage"] == 0.75
    answers = tmp_path / "out" / "chair" / "answers_base.json"
    code, out, _ = vlmdpo(
        *("eval", "--benchmark", "chair", "--data", data, "--answers", answers, "--json")
    )
    assert code == 0
    assert json.loads(out)["scores"] == asked["scores"]
