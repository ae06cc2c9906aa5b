"""`vlmdpo eval` as a user runs it: benchmarks of every kind, resuming, one page for a model."""

import json
import shutil
from pathlib import Path

import pytest

from tests.commands.test_eval_amber import adapter, small  # noqa: F401 - fixtures
from tests.conftest import unfolded
from tests.support import pope_data
from vlmdpo.benchmarks import registry
from vlmdpo.benchmarks.answers import AnswerStore
from vlmdpo.benchmarks.stats import compare
from vlmdpo.commands import evaluate
from vlmdpo.commands.ask_benchmark import Answers
from vlmdpo.config import EvalConfig
from vlmdpo.engine.decode import OpenedImage
from vlmdpo.errors import ConfigError, DataError
from vlmdpo.report import evaluations, figure_rows, model_card
from vlmdpo.tiny import evaluation

IMAGES = ("SCENE_1.png", "SCENE_2.png")
OUT = Path("outputs/eval")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with POPE-like data about two of the embedded images, and questions of one's own."""
    monkeypatch.chdir(tmp_path)
    pope_data.write(tmp_path / "pope", IMAGES)
    for name in IMAGES:
        evaluation.draw_image(name).save(tmp_path / "pope" / name)
    rows = [
        {"image": name, "question": f"Is there a {thing}?", "answer": answer, "group": thing}
        for name in IMAGES
        for thing, answer in (("circle", "yes"), ("dog", "no"))
    ]
    (tmp_path / "pope" / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def run(vlmdpo, *arguments, code=0):
    got, out, err = vlmdpo("eval", "--json", *arguments)
    assert got == code, err
    return (json.loads(out) if code == 0 else None), err


@pytest.mark.slow
def test_pope_asks_each_question_once_and_goes_on_where_it_stopped(
    place,
    adapter,  # noqa: F811
    vlmdpo,
    monkeypatch,
):
    asked = []
    answer = OpenedImage.answer

    def counting(self, questions, *arguments, **more):
        asked.extend(questions)
        return answer(self, questions, *arguments, **more)

    monkeypatch.setattr(OpenedImage, "answer", counting)
    command = ("--benchmark", "pope", "--data", "pope", "--adapter", adapter, "--verify", "0")
    report, _ = run(vlmdpo, *command)
    # 18 questions an image, of which three yes questions and one no question are in all splits.
    assert len(asked) == 2 * len(IMAGES) * (3 + 1 + 2 * 3)
    assert set(report["scores"]["tuned"]) == {
        *("random", "popular", "adversarial", "all", "ours", "repope_rule")
    }
    assert report["benchmark"] == "pope"
    assert report["coverage"] == 1
    assert report["questions"] == 36
    compared = report["comparison"]
    assert set(compared) >= {"delta_accuracy", "ci95", "mcnemar_p", "fixed", "broken", "flips"}
    assert compared["fixed"] + compared["broken"] == len(compared["flips"])
    folder = OUT / "nudged" / "pope"
    assert json.loads((folder / "scores.json").read_text())["scores"] == report["scores"]
    kept = json.loads((folder / "answers_base.json").read_text())
    assert [entry["id"] for entry in kept[:2]] == ["random/1", "random/2"]

    asked.clear()
    for role in ("base", "tuned"):
        path = folder / f"answers_{role}.json"
        path.write_text(json.dumps(json.loads(path.read_text())[:30]))
    again, _ = run(vlmdpo, *command)
    assert again["scores"] == report["scores"]
    assert 0 < len(asked) <= 2 * 6
    _, err = run(vlmdpo, *command, "--max-new-tokens", "3", code=3)
    assert "holds answers of another run (max new tokens: 64 there, 3 now)" in err


@pytest.mark.slow
def test_one_page_shows_every_benchmark_of_a_model(place, small, adapter, vlmdpo):  # noqa: F811
    own = ("--benchmark", "pope/own.jsonl", "--verify", "0")
    run(vlmdpo, *own, "--adapter", adapter)
    command = ("--data", small, "--adapter", adapter, "--limit", "24", "--verify", "0")
    report, _ = run(vlmdpo, *command)
    _, out, _ = vlmdpo("eval-amber", "--json", *command)
    by_its_name = json.loads(out)
    for key in set(by_its_name) - {"output_dir", "settings", "models"}:
        assert report[key] == by_its_name[key], key
    assert report["benchmark"] == "amber"
    page = Path(report["page"])
    assert page == OUT / "nudged" / "report.html"
    html, text = page.read_text(), page.with_name("report.md").read_text()
    for shown in (html, text):
        assert "small" in shown
        assert "own" in shown
        assert "Better after tuning" in shown
        assert "Cover" in shown
        assert "repetition" in shown
    assert html.count("data:image/") > 0
    _, err = run(vlmdpo, *own, "--output-dir", page.parent, code=3)
    assert "of 'tiny' with" in err
    assert "not of 'tiny' without an adapter; a page shows one model" in err
    (page.parent / "amber" / "scores.json").write_text("{}")
    _, err = run(vlmdpo, *own, "--adapter", adapter, code=3)
    assert "amber/scores.json' is damaged" in err


@pytest.mark.slow
def test_the_model_card_has_the_table(place, adapter, vlmdpo):  # noqa: F811
    trained = place / "trained"
    shutil.copytree(adapter, trained)
    report = {
        **{"model": "tiny", "dataset": "scenes", "steps": 1, "loss": 0.5, "engine": "shared"},
        **{"rewards/accuracies": 0.5, "rewards/margins": 0.1, "learning_rate": 1e-5},
        **{"curves": "", "versions": {}},
    }
    (trained / model_card.REPORT).write_text(json.dumps(report))
    (trained / model_card.RECIPE).write_text("model: tiny\nlora: true\n")
    command = ("--benchmark", "pope/own.jsonl", "--adapter", trained, "--verify", "0")
    run(vlmdpo, *command)
    card = (trained / model_card.CARD).read_text()
    assert "### own" in card
    assert "| circle | accuracy ↑ |" in card
    run(vlmdpo, *command, "--overwrite")
    assert (trained / model_card.CARD).read_text().count("### own") == 1


@pytest.mark.slow
def test_missing_images_are_named_before_a_model_is_loaded(place, vlmdpo, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("vlmdpo.commands.ask_benchmark._load", load)
    command = ("--benchmark", "pope", "--data", "pope", "--images", "elsewhere")
    _, err = run(vlmdpo, *command, code=3)
    assert "folder 'elsewhere' of COCO val2014's images does not exist" in err
    Path("elsewhere").mkdir()
    _, err = run(vlmdpo, *command, code=3)
    assert "'elsewhere' lacks all of 2 images (SCENE_1.png ...)" in err


def test_a_response_file_is_scored_without_a_model(place, vlmdpo):
    path = pope_data.answers(place / "answers.jsonl", ["Yes.", "No."] * 6)
    command = ("--benchmark", "pope", "--data", "pope", "--split", "random", "--answers", path)
    report, _ = run(vlmdpo, *command)
    assert report["scores"]["base"]["random"]["accuracy"] == 1
    assert report["comparison"] is None
    assert "output_dir" not in report
    assert not Path("outputs").exists()
    report, _ = run(vlmdpo, *command, "--output-dir", "out", "--limit", "6")
    assert report["part"]["questions"] == 6
    assert Path("out/pope/scores.json").is_file()
    assert Path("out/report.html").is_file()
    code, out, _ = vlmdpo("eval", *command)
    assert code == 0
    assert "POPE, random" in out
    assert "Answers read by: POPE's evaluate.py." in out
    assert "for comparison, always yes: accuracy 50.0, F1 66.7" in out
    _, err = run(vlmdpo, *command, "--output-dir", "out/pope/scores.json", code=3)
    assert "cannot write 'out/pope/scores.json/pope': Not a directory" in err


def test_published_figures_stand_beside_whole_runs_only(benchmark_data, vlmdpo):
    folder = benchmark_data / "pope"
    config = EvalConfig(benchmark="pope", data=folder)
    whole = registry.load("pope", config)
    right = [(question.id, question.truth) for question in whole.questions]
    for responses, published in ((right, 2), (right[:-1], 0)):
        answers = Answers({"base": responses}, {"base": dict(responses)}, {})
        report = evaluate._report(config, whole, whole, answers)
        assert len(report["published"]) == published
        for row in report["published"][:1]:  # in the table's unit
            shown = figure_rows.published_in_words(report, row)
            assert shown == "random F1 87.3, popular F1 86.1, adversarial F1 84.2"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"benchmark": "popes"}, "there is no benchmark 'popes'. Did you mean 'pope'?"),
        ({"benchmark": "pope"}, "--benchmark pope needs --data DIR: the folder of coco_pope_rand"),
        ({"benchmark": "chair", "data": Path("x"), "split": ("random",)}, "--split is for --bench"),
        ({"split": ("random",)}, "--split is for --benchmark pope or repope, not amber"),
        ({"benchmark": "q.jsonl", "task": "generative"}, "--task is for --benchmark amber, not q"),
        (
            {"benchmark": "pope", "data": Path("x"), "answers": Path("a")},
            "--answers holds the answers to one split of pope; name it with --split",
        ),
        ({"benchmark": "q.jsonl", "data": Path("x")}, "--data is for --benchmark amber or pope or"),
        ({"benchmark": "chair", "data": Path("x"), "prompt": " "}, "--prompt is empty"),
        ({"benchmark": "lmms:mme", "answers": Path("a")}, "lmms-eval scores its own answers"),
        ({"benchmark": "pope", "data": Path("x"), "split": ("rare",)}, "--split"),
    ],
)
def test_options_of_other_benchmarks_are_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        EvalConfig(**options)


def test_lengths_of_answers_are_the_benchmarks_own():
    amber, other = EvalConfig(), EvalConfig(benchmark="q.jsonl")
    assert (amber.max_new_tokens, amber.max_description_tokens) == (8, 256)
    assert (other.max_new_tokens, other.max_description_tokens) == (64, 512)
    assert EvalConfig(max_new_tokens=64).max_new_tokens == 64


def test_text_of_models_and_data_is_escaped(place, vlmdpo):
    rows = [{"image": "SCENE_1.png", "question": "<b>Is it?</b>", "answer": "yes", "group": "<i>"}]
    Path("own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("answers.json").write_text('[{"id": 1, "response": "<script>|Yes</script>"}]')
    run(
        vlmdpo,
        *("--benchmark", "own.jsonl", "--answers", "answers.json", "--output-dir", "out"),
    )
    html, text = Path("out/report.html").read_text(), Path("out/report.md").read_text()
    assert "<script>" not in html + text
    assert "<i>" not in html + text
    assert "&lt;script&gt;" in html


def score_own(vlmdpo, rows, *arguments, code=0):
    Path("own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("answers.json").write_text(
        json.dumps([{"id": 1 + i, "response": "Yes"} for i in range(len(rows))])
    )
    command = ("--benchmark", "own.jsonl", "--answers", "answers.json", *arguments)
    return run(vlmdpo, *command, code=code)


def asked_of(*images, group="all"):
    return [
        {"image": image, "question": "Is it?", "answer": "yes", "group": group} for image in images
    ]


def test_a_group_may_be_named_with_a_stroke(vlmdpo):
    report, _ = score_own(vlmdpo, asked_of("a.png", "b.png", group="left/right"))
    assert [row.group for row in figure_rows.rows(report)] == ["all"] * 3 + ["left/right"] * 3
    assert figure_rows.other_readings(report) == {}


def test_one_image_has_no_interval_and_shows_no_difference(vlmdpo):
    report, _ = score_own(vlmdpo, asked_of("a.png", "a.png"))
    assert report["scores"]["base"]["all"]["accuracy"] == 1
    assert report["intervals"]["base"]["all"]["accuracy"] is None
    worst, best = (False, False), (True, True)
    found = compare(worst, best, ["a.png", "a.png"])
    assert (found.delta_accuracy, found.ci95) == (100, (-100, 100))


def test_no_escape_sequence_is_in_markdown(vlmdpo):
    score_own(vlmdpo, asked_of("a.png", group="x\x1b[2J"), "--output-dir", "out")
    assert "\x1b" not in Path("out/report.md").read_text()


def test_other_results_are_shown_on_the_same_page(vlmdpo):
    rows = asked_of("a.png")
    score_own(vlmdpo, rows, "--output-dir", "one")
    shutil.move("one/own", "elsewhere")
    report, _ = score_own(vlmdpo, rows, "--output-dir", "two", "--include", "elsewhere")
    assert report["settings"]["include"] == ["elsewhere"]
    assert Path("two/report.html").read_text().count("<h2>own</h2>") == 2
    # The same file by another path is the same run.
    again = ("--benchmark", Path("own.jsonl").resolve(), "--answers", "answers.json")
    run(vlmdpo, *again, "--output-dir", "two")


@pytest.mark.parametrize(
    "damage", [{"model": ...}, {"comparison": {"figures": {}, "flips": [1]}}, {"models": {}}]
)
def test_a_damaged_report_is_named_before_anything_is_asked(damage, vlmdpo):
    score_own(vlmdpo, asked_of("a.png"), "--output-dir", "out")
    path = Path("out/own/scores.json")
    report = {**json.loads(path.read_text()), **damage}
    path.write_text(json.dumps({key: value for key, value in report.items() if value is not ...}))
    _, err = score_own(vlmdpo, asked_of("a.png"), "--output-dir", "out", code=3)
    assert "'out/own/scores.json' is damaged, or not of vlmdpo eval" in unfolded(err)
    score_own(vlmdpo, asked_of("a.png"), "--output-dir", "out", "--overwrite")


def test_what_the_card_keeps_holds_no_answers_and_no_path(vlmdpo):
    report, _ = score_own(vlmdpo, [*asked_of("a.png"), {**asked_of("a.png")[0], "question": "B?"}])
    facts = report["models"]["base"]
    facts["unread_examples"] = [{"id": 1, "answer": "a private matter"}]
    folder = Path("trained")
    folder.mkdir()
    made = {
        **{"model": "tiny", "dataset": "scenes", "steps": 1, "loss": 0.5, "engine": "shared"},
        **{"rewards/accuracies": 0.5, "rewards/margins": 0.1, "learning_rate": 1e-5},
        **{"curves": "", "versions": {}},
    }
    (folder / model_card.REPORT).write_text(json.dumps(made))
    (folder / model_card.RECIPE).write_text("model: tiny\nlora: true\n")
    for path in ("own.jsonl", "/home/me/own.jsonl"):
        assert model_card.keep_evaluation(folder, {**report, "benchmark": path})
    kept = (folder / model_card.EVALUATIONS).read_text()
    assert "private" not in kept
    assert "/home/me" not in kept
    assert (folder / model_card.CARD).read_text().count("### own") == 1
    (folder / model_card.EVALUATIONS).write_text("{")
    with pytest.raises(DataError, match=r"evaluations.json' is damaged; remove it"):
        model_card.keep_evaluation(folder, report)


def test_a_full_disk_is_named_when_answers_are_closed(tmp_path):
    store = AnswerStore(tmp_path / "out", {})
    store.close()
    store._file = open("/dev/full", "ab")  # noqa: SIM115 - the store closes it
    with pytest.raises(DataError, match="No space left on device"):
        store.put("base", [(1, "Yes")])
    with pytest.raises(DataError, match="No space left on device"):
        store.close()


def test_a_folder_of_other_results_is_refused(place):
    with pytest.raises(evaluations.DataError, match="holds no results of vlmdpo eval"):
        evaluations.read(Path("pope"))


def test_amber_options_reach_amber():
    config = EvalConfig(task="generative", extractor="lexicon", limit=3, output_dir=Path("out"))
    amber = evaluate._as_amber(config)
    assert (amber.task, amber.limit, amber.output_dir) == ("generative", 3, Path("out/amber"))
