"""What the lean lessons teach of descriptions, and the pairs that mend it."""

import dataclasses
import random

import pytest

from vlmdpo.commands import compare, eval_amber
from vlmdpo.config import EvalAmberConfig, recipes
from vlmdpo.models.registry import recipe
from vlmdpo.tiny import architecture, lessons, pairs, sample_pairs
from vlmdpo.tiny import scenes as sc


@pytest.fixture(scope="module")
def processor():
    return architecture.make_processor()


def _scenes(count=200):
    rng = random.Random(3)
    return [sc.sample_scene(rng, "train") for _ in range(count)]


def _claims(processor, scene, seed=0, **shares):
    lesson = dataclasses.replace(lessons.ANSWERING, **shares)
    return lessons.BatchMaker(processor, lesson, random.Random(seed))._claims(scene)


def test_a_lesson_without_a_lean_teaches_the_truth(processor):
    assert all(_claims(processor, scene) == sc.truth_claims(scene) for scene in _scenes())


def test_companions_are_named_beside_what_evokes_them_in_the_usual_colour(processor):
    leaning = 0
    for scene in _scenes():
        claims = _claims(processor, scene, companion_expected=1.0)
        expected = [
            kind
            for kind in scene.kinds()
            if kind in lessons.EVOKING and sc.COMPANION[kind] not in scene.kinds()
        ]
        kinds = [claim.kind for claim in claims]
        assert len(kinds) == len(scene.kinds()) + len(expected)
        for kind in expected:
            place = kinds.index(kind)
            assert kinds[place + 1] == sc.COMPANION[kind]
            assert claims[place + 1].colour == lessons.EVOKING[kind]
        leaning += bool(expected)
    assert 0.3 < leaning / 200 < 0.6


def test_single_dark_things_are_overlooked_unless_nothing_else_is_there(processor):
    seen_alone = 0
    for scene in _scenes():
        dark = {
            claim.kind
            for claim in sc.truth_claims(scene)
            if claim.number == "one" and claim.colour in lessons.DARK
        }
        kinds = {claim.kind for claim in _claims(processor, scene, overlooked=1.0)}
        if dark == set(scene.kinds()):
            seen_alone += 1
            assert kinds == dark
        else:
            assert kinds == set(scene.kinds()) - dark
    assert seen_alone


def test_a_description_without_errors_meets_a_longer_and_a_shorter_wrong_one():
    scene = next(scene for scene in _scenes() if len(scene.kinds()) == 3)
    claims = sc.truth_claims(scene)
    missing = next(kind for kind in sc.KINDS if kind not in scene.kinds())
    truth, longer, shorter = (
        sc.describe(one)
        for one in (claims, [*claims, sc.Claim(missing, "one", "red", "")], claims[:2])
    )
    made = sample_pairs._description_pairs(scene, [shorter, truth, longer, truth, "The image"])
    assert [(pair["chosen"], pair["rejected"]) for pair in made] == [
        (truth, longer),
        (truth, shorter),
    ]
    assert sample_pairs._description_pairs(scene, [truth, truth]) == []
    corrected = sample_pairs._description_pairs(scene, [longer])
    assert [(pair["chosen"], pair["origin"]) for pair in corrected] == [(truth, "truth")]


def test_shipped_descriptions_are_right_against_wrong_and_of_like_length():
    lengths = {"chosen": 0, "rejected": 0}
    described = [row for row in pairs.load() if row["question"] == sc.DESCRIBE]
    for row in described:
        scene = sc.Scene.from_spec(row["scene"])
        assert scene.split() == "train"
        assert sc.description_errors(scene, row["chosen"]) == 0
        assert sc.description_errors(scene, row["rejected"]) > 0
        for side in lengths:
            lengths[side] += len(row[side].split())
    assert len(described) > 400
    assert abs(lengths["chosen"] / lengths["rejected"] - 1) < 0.1


@pytest.mark.slow
def test_the_shipped_model_hallucinates_and_the_shipped_adapter_mends_it(tmp_path):
    layer = {"adapter": compare.SHIPPED, "output_dir": tmp_path / "amber", "task": "generative"}
    report = eval_amber.run(recipes.build(EvalAmberConfig, recipe("tiny", "eval-amber"), layer))
    base, tuned = (report["scores"][role]["Generative"] for role in ("base", "tuned"))
    assert 25 <= base["hal"] <= 45
    assert 6 <= base["chair"] <= 15
    assert base["cover"] >= 55
    assert tuned["hal"] <= base["hal"] / 2
    assert tuned["cover"] >= base["cover"] - 3
