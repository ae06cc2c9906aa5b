"""Scenes, their questions, and the two embedded sets made from them."""

import json
import random
from collections import Counter

from vlmdpo.benchmarks.amber import questions as qs
from vlmdpo.tiny import evaluation, pairs
from vlmdpo.tiny import scenes as sc


def _some(count=60, split="train"):
    rng = random.Random(7)
    return [sc.sample_scene(rng, split) for _ in range(count)]


def test_specs_read_back_as_the_same_scene_and_image():
    for scene in _some(10):
        again = sc.Scene.from_spec(json.loads(json.dumps(scene.spec())))
        assert again == scene
        assert sc.draw(again).tobytes() == sc.draw(scene).tobytes()
        assert sc.draw(scene).size == (sc.SIDE_PX, sc.SIDE_PX)


def test_train_and_evaluation_scenes_do_not_mix():
    assert {scene.split() for scene in _some(60, "evaluation")} == {"evaluation"}
    assert {scene.split() for scene in _some(60, "train")} == {"train"}


def test_truths_follow_from_the_scene():
    for scene in _some():
        groups = sc.questions(scene, random.Random(0))
        absent = {q.text.split()[3] for q in groups.get((sc.EXISTENCE, "no"), [])}
        assert absent | set(scene.kinds()) == set(sc.KINDS)
        for question in groups[sc.STATE, "yes"]:
            _, _, kind, colour, *_ = question.text.split()
            assert {thing.colour for thing in scene.of(kind)} == {colour}
        for (kind, truth), group in groups.items():
            assert (kind == sc.RELATION_NO) <= (truth == "no")
            assert {question.truth for question in group} == {truth}


def test_descriptions_are_judged_by_the_scene():
    for scene in _some():
        claims = sc.truth_claims(scene)
        text = sc.describe(claims)
        assert sc.read_claims(text) == claims
        assert sc.description_errors(scene, text) == 0
        missing = next(kind for kind in sc.KINDS if kind not in scene.kinds())
        invented = [*claims, sc.Claim(missing, "one", "red", "")]
        assert sc.description_errors(scene, sc.describe(invented)) == 3
        wrong = [
            sc.Claim(
                claims[0].kind,
                claims[0].number,
                "red" if claims[0].colour != "red" else "blue",
                claims[0].action,
            )
        ]
        assert sc.description_errors(scene, sc.describe(wrong)) == 1 + len(claims) - 1


def test_evaluation_set_is_ambers_layout_and_proportions():
    benchmark = qs.read(evaluation.FOLDER)
    assert len(benchmark.questions) >= 1000
    counts = Counter((question.dimension, question.truth) for question in benchmark.questions)
    amber = {
        "Existence": (4924, 0),
        "State": (4764, 2382),
        "Number": (2072, 1036),
        "Action": (792, 396),
        "Relation": (1664, 975),
    }
    scale = len(benchmark.questions) / 14216
    for dimension, (questions, yes) in amber.items():
        assert abs(counts[dimension, "yes"] + counts[dimension, "no"] - scale * questions) <= 3, (
            dimension
        )
        assert abs(counts[dimension, "yes"] - scale * yes) <= 3, dimension
    assert len(benchmark.descriptions) == 100
    generative = json.loads((evaluation.FOLDER / "query" / "query_generative.json").read_text())
    assert {entry["query"] for entry in generative} == {"Describe this image."}
    assert len({(question.image, question.text) for question in benchmark.questions}) == len(
        benchmark.questions
    )


def test_shipped_evaluation_set_is_what_the_code_makes():
    for name, data in evaluation.make().items():
        shipped = (evaluation.FOLDER / name).read_text()
        assert (shipped if isinstance(data, str) else json.loads(shipped)) == json.loads(
            json.dumps(data)
        ), name


def test_training_pairs_are_many_and_disjoint_from_the_evaluation():
    rows = pairs.load()
    assert len(rows) >= 2000
    assert sum(row["origin"] == "sampled" for row in rows) > len(rows) / 2
    made = [sc.Scene.from_spec(row["scene"]) for row in rows]
    assert {scene.split() for scene in made} == {"train"}
    held_out = json.loads((evaluation.FOLDER / "scenes.json").read_text())
    evaluated = {sc.Scene.from_spec(spec) for spec in held_out.values()}
    assert {scene.split() for scene in evaluated} == {"evaluation"}
    assert not {scene.key() for scene in made} & {scene.key() for scene in evaluated}


def test_training_pairs_prefer_what_is_true():
    judged = 0
    for row in pairs.load():
        scene = sc.Scene.from_spec(row["scene"])
        if row["question"] == sc.DESCRIBE:
            assert sc.description_errors(scene, row["chosen"]) < sc.description_errors(
                scene, row["rejected"]
            )
        else:
            # Wrong properties are drawn at random, so look the question up in enough draws to meet
            # it.
            truths = {
                question.truth.capitalize()
                for seed in range(40)
                for group in sc.questions(scene, random.Random(seed)).values()
                for question in group
                if question.text == row["question"]
            }
            if truths:
                assert truths == {row["chosen"]}
                judged += 1
        if judged > 300:
            break
    assert judged > 300
