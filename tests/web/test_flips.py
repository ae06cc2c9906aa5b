"""Flips of an evaluation as examples to ask about."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from vlmdpo.commands import compare
from vlmdpo.config import CompareConfig
from vlmdpo.errors import DataError
from vlmdpo.web import flips

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter():
    """An adapter whose weights are a few bytes: only their digest is looked at."""
    folder = Path("outputs/mine")
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(b"weights")
    return folder


def _write(folder, changed, *, weights=b"weights", **report):
    """An evaluation's folder, as vlmdpo eval leaves it."""
    import hashlib

    folder = Path(folder)
    folder.mkdir(parents=True)
    digest = hashlib.sha256(weights).hexdigest()[:16]
    (folder / "run.json").write_text(json.dumps({"adapter_digest": digest}))
    settings = report.pop("settings", {})
    if isinstance(settings, dict):
        settings = {"data": None, "images": None, **settings}
    facts = {"coverage": 1.0, "unread": 0, "words": 1.0, "repetition": 0.0}
    whole = {
        **{"title": "POPE", "benchmark": "pope", "model": "tiny", "adapter": "outputs/mine"},
        **{"figures": {}, "scores": {"base": {}, "tuned": {}}, "intervals": {}, "published": []},
        **{"rule": "ours", "questions": 1, "descriptions": 0, "part": None, "notes": []},
        **{"models": {"base": facts, "tuned": facts}, "engine": None, "fallback_reason": None},
        **{"bad_pictures": {}, "bad_questions": {}, "bootstrap": {"draws": 1, "over": "images"}},
        **{"versions": {}, "settings": settings},
        **{"comparison": {"flips": changed}, **report},
    }
    (folder / "scores.json").write_text(json.dumps(whole))
    return folder


def _flip(image, question="Is there a dog?"):
    said = {"base": "Yes", "tuned": "No", "fixed": True}
    return {"id": 1, "image": image, "question": question, **said}


def _picture(path):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9)).save(path)


def _found(folder, adapter):
    Path("shown").mkdir(exist_ok=True)
    return flips.from_evaluation(folder, adapter, Path("shown"), "--eval")


@pytest.mark.parametrize(
    ("benchmark", "settings", "picture"),
    [
        ("pope", {"data": "coco"}, "coco/1.png"),
        ("chair", {"data": "annotations", "images": "val2014"}, "val2014/1.png"),
        ("my/questions.jsonl", {}, "my/1.png"),
        ("my/questions.jsonl", {"images": "elsewhere"}, "elsewhere/1.png"),
        ("amber", {"data": "AMBER"}, "AMBER/image/1.png"),
    ],
)
def test_images_are_where_each_benchmark_has_them(benchmark, settings, picture, adapter):
    _picture(picture)
    folder = _write("e", [_flip("1.png", "What?")], benchmark=benchmark, settings=settings)
    (example,) = _found(folder, adapter)
    title = "eval-amber" if benchmark == "amber" else "POPE"
    assert (example.question, example.source) == ("What?", f"changed in {title}")
    assert example.image.is_file()


def test_eval_ambers_own_reports_are_read_descriptions_with_its_prompt(adapter):
    described = {"id": 2, "image": "SCENE_2.png", "base": "a dog", "tuned": "a cat", "fixed": True}
    changed = {**_flip("SCENE_1.png"), "dimension": "Existence"}
    _write("e", [])
    report = {
        **{"data": "scenes", "is_amber": False, "questions": {"Discriminative": 2}, "unparsed": 0},
        **{"scores": {"base": {}, "tuned": {}}, "models": {}, "adapter": "outputs/mine"},
        **json.loads(Path("e/scores.json").read_text()),
        "questions": {"Discriminative": 2},
        "settings": {"data": None, "images": None},
        "comparison": {
            **{"delta_accuracy": 1, "ci95": [0, 2], "verdict": "no difference shown"},
            "flips": [changed],
        },
        "generative_comparison": {"figures": {}, "flips": [described]},
    }
    report = {name: value for name, value in report.items() if name != "figures"}
    Path("e/scores.json").write_text(json.dumps({**report, "models": {}, "scores": {}}))
    found = _found(Path("e"), adapter)
    assert [example.question for example in found] == ["Is there a dog?", "Describe this image."]
    assert {example.source for example in found} == {"changed in eval-amber"}


def test_an_image_outside_its_root_is_not_shown(adapter):
    _picture("secret.png")
    _picture("coco/1.png")
    outside = [_flip("../secret.png"), _flip(str(Path("secret.png").absolute()))]
    folder = _write("e", [*outside, _flip("1.png", "Mine?")], settings={"data": "coco"})
    assert [example.question for example in _found(folder, adapter)] == ["Mine?"]
    folder = _write("f", outside, settings={"data": "coco"})
    with pytest.raises(DataError, match=r"of 'coco', none of .*\.\./secret\.png"):
        _found(folder, adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": b"others"}, "is an evaluation of another adapter"),
        ({"changed": []}, "no answer changed between base and tuned"),
        ({"comparison": None}, "no answer changed between base and tuned"),
        ({"comparison": None, "scores": {"tuned": {}}}, "has the scores of one model"),
        ({"benchmark": "lmms:mme"}, "is of lmms-eval, which keeps no images"),
        ({"changed": [{"image": "1.png"}]}, "is damaged"),
        ({"comparison": 3}, "is damaged"),
        ({"settings": 3}, "is damaged|not of vlmdpo eval"),
    ],
)
def test_a_folder_of_anything_else_is_refused_in_one_line(changes, message, adapter):
    folder = _write("e", **{"changed": [_flip("1.png")], **changes})
    with pytest.raises(DataError, match=message) as caught:
        _found(folder, adapter)
    assert str(caught.value).startswith("--eval: 'e")
    assert "\n" not in str(caught.value)


def test_a_folder_without_an_evaluation_is_refused_and_one_of_several_names_them(adapter):
    with pytest.raises(DataError, match=r"^--eval: '.*holds no results of vlmdpo eval"):
        _found(Path("outputs"), adapter)
    _write("all/pope", [])
    _write("all/chair", [])
    with pytest.raises(DataError, match="several evaluations; name one: chair, pope"):
        _found(Path("all"), adapter)


def test_the_latest_evaluation_of_the_adapter_that_shows_something_is_used(adapter):
    import os

    _picture("coco/1.png")
    coco = {"settings": {"data": "coco"}}
    names = ("outputs/eval/mine/pope", "outputs/amber/amber-mine", "outputs/eval/mine/lmms-mme")
    _write(names[0], [_flip("1.png", "POPE?")], **coco)
    _write(names[1], [_flip("1.png", "older?")], **coco)
    _write(names[2], [_flip("1.png", "lmms?")], benchmark="lmms:mme")
    _write("outputs/eval/other/pope", [_flip("1.png", "other?")], **coco)
    for age, name in enumerate((names[2], names[0], names[1], "outputs/eval/other/pope")):
        os.utime(f"{name}/scores.json", (1000 - age, 1000 - age))
    config = CompareConfig(adapter=adapter, model="tiny")
    Path("shown").mkdir()
    found = compare._changed(config, adapter, Path("shown"))
    assert [example.question for example in found] == ["POPE?"]
    both = dataclasses.replace(config, eval=Path(names[0]), amber=Path(names[1]))
    found = compare._changed(both, adapter, Path("shown"))
    assert [example.question for example in found] == ["POPE?", "older?"]
    assert len({example.image for example in found}) == 2
    shutil.rmtree("outputs/eval/mine")
    found = compare._changed(config, adapter, Path("shown"))
    assert [example.question for example in found] == ["older?"]
