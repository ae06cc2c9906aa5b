"""runs: trainings side by side, on the screen, as JSON and as a page, whatever lies in a folder."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from vlmdpo.report import runs_page


def _run(name, *, rate=1e-5, steps=6, test=False, done=True, amber=None, **settings):
    folder = Path("outputs") / name
    folder.mkdir(parents=True)
    recipe = {"model": "tiny", "dataset": "data", "learning_rate": rate, **settings}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lines = [
        {
            "step": step,
            "loss": 0.7 - rate * 1e3 * step,
            "rewards/accuracies": 0.5,
            "rewards/margins": 0.1 * step,
        }
        for step in range(1, steps + 1)
    ]
    if test:
        lines.append({"step": steps, "eval_loss": 0.61, "eval_rewards/accuracies": 0.75})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if done:
        (folder / "train_report.json").write_text(json.dumps({"steps": steps}))
    if amber:
        (folder / "amber.json").write_text(json.dumps(amber))
    return folder


AMBER = {
    "scores": {
        "base": {"Discriminative": {"accuracy": 70.0, "f1": 71.0}},
        "tuned": {"Discriminative": {"accuracy": 74.0, "f1": 75.5}, "Generative": {"chair": 6.5}},
    },
    "comparison": {"delta_accuracy": 4.0},
}


@pytest.fixture
def three():
    _run("one", test=True, amber=AMBER)
    _run("two", rate=2e-5, lora_r=8)
    _run("deep/er/three", rate=2e-5, steps=3, done=False, set=["max_grad_norm=0.5"])


def test_the_report_has_what_differs_and_the_scores(three, vlmdpo):
    code, out, err = vlmdpo("runs", "outputs", "--json")
    assert code == 0, err
    report = json.loads(out)
    runs = {one["name"]: one for one in report["runs"]}
    assert list(runs) == ["deep/er/three", "one", "two"]
    assert set(report["differing"]) == {"learning_rate", "lora_r", "set"}
    assert (runs["one"]["is_finished"], runs["deep/er/three"]["is_finished"]) == (True, False)
    assert runs["deep/er/three"]["steps"] == 3
    assert runs["one"]["eval"]["loss"] == 0.61
    assert runs["one"]["amber"] == {
        **dict.fromkeys(runs_page.SCORES),
        **{"accuracy": 74.0, "f1": 75.5, "chair": 6.5, "delta_accuracy": 4.0},
    }
    assert runs["two"]["amber"] is None
    assert runs["two"]["settings"]["lora_alpha"] == 32, "a default that the recipe leaves out"


def test_the_screen_and_the_page(three, vlmdpo, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = vlmdpo("runs", "--folder", "outputs")
    assert code == 0, err
    print(out)
    assert "(not finished)" in " ".join(out.split())
    assert re.search(r"one +6 +0.6400 +0.500 +\+0.600 +0.6100 +75.5", out)
    assert "outputs/runs.html" in out
    page = Path("outputs/runs.html").read_text()
    assert page.count("<polyline") == 3 * 3 + 2, "three curves a chart, and two of the test split"
    for text in ("AMBER", "75.5", "learning_rate", "not finished", "max_grad_norm=0.5"):
        assert text in page
    assert "<script" not in page
    assert "default-src 'none'" in page


def test_names_and_values_are_escaped(vlmdpo):
    _run("<img src=x>", rate=1e-5, dataset="<b>&data")
    _run("two", dataset="\x1b]0;title\x07")
    code, _, err = vlmdpo("runs", "outputs")
    assert code == 0, err
    page = Path("outputs/runs.html").read_text()
    assert "<img" not in page
    assert "<b>" not in page
    assert "&lt;img src=x&gt;" in page


def test_damaged_runs_are_left_out_by_name_and_others_stay(three, vlmdpo):
    (_run("bad-recipe") / "recipe.yaml").write_text("[")
    (_run("bad-log") / "metrics.jsonl").write_text("{\n")
    (_run("bad-report") / "train_report.json").write_text("[]")
    (_run("bad-scores") / "amber.json").write_text('{"scores": {"tuned": 3}}')
    shutil.copytree("outputs/one", "outputs/one/checkpoint-4")
    code, out, err = vlmdpo("runs", "outputs", "--json", "--no-page")
    assert code == 0, err
    assert {one["name"] for one in json.loads(out)["runs"]} == {
        *("one", "two", "deep/er/three", "bad-scores"),
    }
    for name in ("bad-recipe", "bad-log", "bad-report"):
        assert f"left out 'outputs/{name}'" in err
    assert "metrics.jsonl' line 1 is damaged (Expecting property name" in err
    assert err.count("restore the file to list this run") == 2
    assert "remove it" not in err
    assert not Path("outputs/runs.html").exists()


def test_a_folder_without_runs_is_said(vlmdpo):
    code, _, err = vlmdpo("runs", "outputs")
    assert code == 3
    assert "'outputs' is not a folder" in err
    Path("outputs").mkdir()
    code, _, err = vlmdpo("runs")
    assert code == 3
    assert "'outputs' holds no run of vlmdpo train" in err


def test_curves_bear_outliers_single_points_and_what_is_no_number():
    lines = [{"step": n, "loss": 1e9 if n == 7 else 0.5} for n in range(1, 400)]
    lines[3]["loss"] = float("nan")
    one = {"name": "a", "settings": {}, "amber": None, "lines": lines, "test": [lines[0]]}
    chart = runs_page._chart("Loss", "loss", "lines", [one])
    assert len(chart["curves"][0]["points"].split()) == 201
    assert runs_page._chart("Loss", "loss", "test", [one])["last"] == 2
    assert runs_page._chart("Loss", "grad_norm", "lines", [one])["curves"] == []
