"""What a user sees of a run: dashboard, page, samples, evaluation, and diagnosis."""

import io
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.conftest import unfolded
from vlmdpo import ui
from vlmdpo.config import TrainConfig
from vlmdpo.data import store
from vlmdpo.errors import ConfigError
from vlmdpo.report import run_page
from vlmdpo.report.diagnosis import diagnose
from vlmdpo.training import memory_forecast, results
from vlmdpo.training.monitor import TrainingMonitor
from vlmdpo.ui import live

pytestmark = pytest.mark.slow

_ONE_BY_ONE = (
    "--logging-steps",
    "1",
    "--per-device-train-batch-size",
    "8",
    "--gradient-accumulation-steps",
    "1",
)
_STEADY = ("--lr-scheduler-type", "constant")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """200 pairs of the embedded data, a tenth of them in the test split."""
    from vlmdpo import cli

    folder = tmp_path_factory.mktemp("scenes") / "data"
    assert (
        cli.run(
            [
                "prepare",
                "--limit",
                "200",
                "--test-size",
                "0.1",
                "--output-dir",
                str(folder),
                "--quiet",
            ]
        )
        == 0
    )
    return folder


@pytest.fixture(scope="module")
def made_to_show(tmp_path_factory, scenes):
    """Data made for one finding each: random labels, similar answers, likely chosen answers."""
    folder, dice = tmp_path_factory.mktemp("shows"), random.Random(1)
    rows = [store.load(scenes)[number] for number in range(128)]
    for number, row in enumerate(rows):
        row["images"][0].save(folder / f"{number}.png")
    crosses, rings = (
        "There are three blue crosses and two green rings.",
        "There are two blue crosses and three green rings.",
    )

    def answers(kind, row):
        if kind == "alike":
            return (rings, crosses) if dice.random() < 0.25 else (crosses, rings)
        if kind == "likely":
            return row["chosen"][0]["content"][0][
                "text"
            ], "and three blue stars and then some more of these."
        return ("Yes", "No") if dice.random() < 0.5 else ("No", "Yes")

    for kind in ("coins", "alike", "likely", "few"):
        lines = []
        for number, row in enumerate(rows[: 48 if kind == "few" else None]):
            asked = [part["text"] for part in row["prompt"][0]["content"] if part["text"]][-1]
            question = "Describe this image." if kind == "alike" else asked
            chosen, rejected = answers(kind, row)
            lines.append(
                {
                    "image": f"{number}.png",
                    "question": question,
                    "chosen": chosen,
                    "rejected": rejected,
                }
            )
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


_PLAIN = ("--loss-type", "sigmoid")  # without the anchor that the embedded model's recipe adds


def _train(vlmdpo, data, *more):
    code, out, err = vlmdpo(
        "train", "--dataset", data, "--output-dir", "out", *_ONE_BY_ONE, *_PLAIN, *more, "--json"
    )
    assert code == 0, err
    return json.loads(out), err


def _lines(name):
    return [json.loads(line) for line in Path(f"out/{name}.jsonl").read_text().splitlines()]


def _also(*values):
    """Those findings are tested on made-up curves too."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("kind", "steps", "settings", "names"),
    [
        ("scenes", 3, (), ["too_early"]),
        ("scenes", 24, ("--learning-rate", "5e-4", "--loss-type", "sigmoid,sft"), ["learning"]),
        ("scenes", 8, ("--learning-rate", "1e-9"), ["not_moving"]),
        ("scenes", 12, ("--learning-rate", "1e-2", "--beta", "2", *_STEADY), ["diverged"]),
        _also("coins.jsonl", 16, ("--learning-rate", "1e-2", *_STEADY), ["accuracy_at_chance"]),
        _also("alike.jsonl", 12, ("--learning-rate", "4e-3", *_STEADY), ["both_fall"]),
        _also(
            *("likely.jsonl", 12, ("--learning-rate", "3e-4")),
            ["only_rejected_falls", "nothing_left"],
        ),
        ("few", 40, ("--learning-rate", "4e-3", "--eval-steps", "4"), ["overfits"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_each_kind_of_run_gets_its_diagnosis(
    vlmdpo, scenes, made_to_show, kind, steps, settings, names
):
    data = scenes if kind == "scenes" else made_to_show / kind
    if kind == "few":
        data = "held"
        code, _, err = vlmdpo(
            "prepare",
            "--dataset",
            made_to_show / "few.jsonl",
            "--test-size",
            "0.5",
            "--output-dir",
            data,
        )
        assert code == 0, err
    report, _ = _train(
        vlmdpo,
        data,
        "--max-steps",
        steps,
        *settings,
        *(() if kind == "few" else ("--eval-steps", "0")),
    )
    found = {finding["name"]: finding for finding in report["diagnosis"]}
    assert set(names) <= set(found), found
    assert ("learning" in found) == (names == ["learning"])
    for finding in found.values():
        assert re.search(r"\d", finding["seen"]), "what was seen has its numbers"
        assert finding["tries"]
        assert finding["title"] in Path("out/run.html").read_text()


@pytest.mark.parametrize(
    ("loss", "accuracy", "margin", "chosen", "names"),
    [
        (0.69, 0.5, 0.0, 1.0, ["accuracy_at_chance"]),
        (0.5, 0.9, 1.0, -2.0, ["both_fall"]),
        (0.5, 0.9, 1.0, 0.0, ["only_rejected_falls"]),
        (0.05, 1.0, 4.0, 0.0, ["only_rejected_falls", "nothing_left"]),
    ],
)
def test_what_rewards_say(loss, accuracy, margin, chosen, names):
    lines = [
        {
            "step": step,
            "loss": loss,
            "rewards/accuracies": accuracy,
            "rewards/margins": margin * step / 12,
            "rewards/chosen": chosen * step / 12,
            "rewards/rejected": (chosen - margin) * step / 12,
        }
        for step in range(1, 13)
    ]
    assert [finding.name for finding in diagnose(lines, learning_rate=1e-6, beta=0.1)] == names


def test_other_losses_are_judged_by_their_start():
    lines = [{"step": step, "loss": 25.0, "rewards/accuracies": 0.5} for step in range(1, 9)]
    assert [finding.name for finding in diagnose(lines, learning_rate=1e-6)] == ["not_moving"]
    risen = [
        {**line, "loss": 25.0 + step, "rewards/chosen": -1.0} for step, line in enumerate(lines)
    ]
    assert [finding.name for finding in diagnose(risen, learning_rate=1e-6)] == ["diverged"]


def test_small_rewards_due_to_a_small_beta_count_as_progress():
    lines = [
        {
            "step": n,
            "loss": 0.69,
            "rewards/accuracies": 0.9,
            "rewards/margins": 0.001 * n,
            "rewards/chosen": 0.0005 * n,
        }
        for n in range(1, 13)
    ]
    assert [finding.name for finding in diagnose(lines, learning_rate=1e-6, beta=0.1)] == [
        "not_moving"
    ]
    assert [finding.name for finding in diagnose(lines, learning_rate=1e-6, beta=0.01)] == [
        "learning"
    ]


def test_evaluation_and_samples_are_the_same_after_a_resume(vlmdpo, scenes):
    settings = (
        "--max-steps",
        "8",
        "--eval-steps",
        "2",
        "--sample-every",
        "3",
        "--save-steps",
        "4",
        "--lora-dropout",
        "0.1",
    )
    report, err = _train(vlmdpo, scenes, *settings)
    assert "step 2/8: eval loss" in err
    assert "step 3/8: loss" in err
    assert "pairs/s" in err
    lines = _lines("metrics")
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 6, 8]
    assert report["eval"]["loss"] == pytest.approx(
        [line["eval_loss"] for line in lines if "eval_loss" in line][-1]
    )
    samples = _lines("samples")
    assert sorted({sample["step"] for sample in samples}) == [0, 3, 6, 8]
    assert min(sample["row"] for sample in samples) >= len(store.load(scenes)), (
        "asked about rows that do not train"
    )
    adapter = Path("out/adapter_model.safetensors").read_bytes()
    shutil.rmtree("out/checkpoint-8")
    _train(vlmdpo, scenes, *settings, "--resume")
    assert Path("out/adapter_model.safetensors").read_bytes() == adapter
    assert _lines("samples") == samples
    again = _lines("metrics")
    assert [(line["step"], line.get("eval_loss"), line.get("loss")) for line in again] == [
        (line["step"], line.get("eval_loss"), line.get("loss")) for line in lines
    ]


def test_each_row_of_the_test_split_counts_the_same_in_any_batch(vlmdpo, scenes):
    found, answers = [], []
    for batch, steps in (
        ("2", "12"),
        ("8", "3"),
        ("24", "1"),
    ):  # for 21 rows: a short last batch, and a single one
        settings = (
            "--per-device-train-batch-size",
            batch,
            "--gradient-accumulation-steps",
            steps,
            "--logging-steps",
            "1",
        )
        rate = (
            "--max-steps",
            "1",
            "--learning-rate",
            "1e-3",
            "--lora-dropout",
            "0",
            "--eval-steps",
            "1",
            "--overwrite",
        )
        code, _, err = vlmdpo(
            "train", "--dataset", scenes, "--output-dir", "out", *settings, *rate, *_PLAIN, "--json"
        )
        assert code == 0, err
        found.append(_lines("metrics")[-1])
        answers.append(_lines("samples"))
    for line in found[1:]:
        for name in ("eval_loss", "eval_rewards/accuracies", "eval_logps/chosen"):
            assert line[name] == pytest.approx(found[0][name], rel=1e-3)
    assert answers[0] == answers[1] == answers[2], "asked by twos, or all at once"


def test_evaluation_and_samples_do_not_change_the_training(vlmdpo, scenes):
    """Except for draws of the data loader, which have no effect without dropout."""
    plain = ("--max-steps", "4", "--lora-dropout", "0")
    _train(vlmdpo, scenes, *plain, "--eval-steps", "0", "--sample-every", "0")
    assert not (Path("out") / "samples.jsonl").exists()
    adapter = Path("out/adapter_model.safetensors").read_bytes()
    _train(vlmdpo, scenes, *plain, "--eval-steps", "1", "--sample-every", "1", "--overwrite")
    assert Path("out/adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.parametrize(
    "way", [("--no-lora",), ("--loss", "mdpo"), ("--engine", "stock")], ids=" ".join
)
def test_every_way_of_training_evaluates(vlmdpo, scenes, way):
    report, _ = _train(vlmdpo, scenes, "--max-steps", "2", "--eval-steps", "1", *way)
    lines = _lines("metrics")
    assert sum("eval_loss" in line for line in lines) == 2
    assert 0 < report["eval"]["loss"] < 3
    assert yaml.safe_load(Path("out/recipe.yaml").read_text())["eval_steps"] == 1


def test_samples_of_a_sharded_model_are_opt_in_and_refused_under_zero3():
    def shown(deepspeed, every):
        asked = []
        trainer = SimpleNamespace(
            is_deepspeed_enabled=deepspeed,
            args=SimpleNamespace(process_index=1, train_batch_size=2),
        )
        trainer.datasets, trainer.processing_class, trainer.add_callback = (
            [[{"row": 0}]],
            None,
            asked.append,
        )
        setup = SimpleNamespace(trainer=trainer, monitor=None, is_sharded=True)
        results.attach_samples_and_page(setup, Path("out"), TrainConfig(sample_every=every))
        return asked

    assert (
        shown(deepspeed=False, every=None)
        == shown(deepspeed=True, every=None)
        == shown(deepspeed=False, every=0)
        == []
    )
    assert len(shown(deepspeed=False, every=5)) == 1
    with pytest.raises(ConfigError, match="ZeRO-3"):
        shown(deepspeed=True, every=5)


def test_eval_steps_without_a_test_split_says_how_to_get_one(vlmdpo, made_to_show):
    code, _, err = vlmdpo(
        "train",
        "--dataset",
        made_to_show / "coins.jsonl",
        "--eval-steps",
        "5",
        "--output-dir",
        "out",
    )
    assert code == 2
    assert "prepare --test-size" in err
    assert not Path("out").exists()


def test_the_report_has_the_estimated_peak(vlmdpo, scenes):
    report, _ = _train(vlmdpo, scenes, "--max-steps", "1", "--eval-steps", "0", "--foresee-memory")
    assert report["foreseen_peak_bytes"] > 10_000_000


def test_memory_is_shown_beside_its_estimate():
    monitor = TrainingMonitor(Path("metrics.jsonl"), forecast=SimpleNamespace(peak_bytes=3 * 2**28))
    shown = monitor._memory(SimpleNamespace(device=SimpleNamespace(type="cpu")))
    assert re.fullmatch(r"process \d+\.\d\d GiB, tensors estimated 0\.75", shown)


def test_an_estimate_that_fails_is_a_warning(capfd, monkeypatch):
    """A real process, of a moment: test_auto_batch has one of `estimate-memory` fail."""
    fails = "raise SystemExit('error: \\'nowhere\\' is not a\\n       folder; run vlmdpo prepare')"
    start = subprocess.Popen
    monkeypatch.setattr(
        "vlmdpo.training.memory_forecast.subprocess.Popen",
        lambda command, **options: start([sys.executable, "-S", "-c", fails], **options),
    )
    made = memory_forecast.MemoryForecast(TrainConfig(), Path("nowhere"), "bfloat16")
    try:
        made.wait_or_warn()
        assert made.peak_bytes is None
        assert re.search(
            r"no estimate of the peak memory: .*nowhere' is not a folder; run vlmdpo",
            unfolded(capfd.readouterr().err),
        )
    finally:
        made.close()


def test_the_page_escapes_texts_and_runs_only_its_own_script():
    evil = "<script>alert(1)</script></script>"
    sample = {
        "step": 0,
        "row": 3,
        "question": evil,
        "answer": evil,
        "chosen": evil,
        "rejected": evil,
    }
    lines = [{"step": 1, "loss": 0.7, "rewards/margins": float("nan"), "grad_norm": 1.0}]
    text = run_page.page(
        title=evil,
        steps=(1, 2),
        lines=lines,
        evaluations=[],
        samples=[sample],
        pictures={},
        settings={"model": evil},
        findings=diagnose(lines, learning_rate=1e-5),
    )
    assert "alert(1)" in text
    assert "<script>alert" not in text
    assert text.count("<script") == 2
    assert "script-src 'sha256-" in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "NaN" not in text


def test_the_dashboard_keeps_its_place_on_a_terminal(monkeypatch):
    from rich.console import Console

    held = Console(force_terminal=True, width=80, height=30, file=io.StringIO(), _environ={})
    monkeypatch.setattr(live, "err", lambda **_: held)
    with ui.dashboard("train", 20) as board:
        board.step(5, 21.5, 61.0)
        board.figures(
            [
                ui.Figure("loss", "0.5", [0.7, 0.6, 0.5]),
                ui.Figure("eval", "loss 0.6", [0.6], "eval {}"),
            ]
        )
    screen = held.file.getvalue()
    assert "5/20" in screen
    assert "21.5 pairs/s, 0:01:01 left" in screen
    assert "█▅▁" in screen or "█▄▁" in screen
    assert "loss 0.6" in screen
    assert ui.sparkline([2.0, 2.0]) == "▁▁"


def test_the_page_draws_its_curves_in_a_browser_and_smooths_them():
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium")
    lines = [
        {
            "step": n,
            "loss": 0.7 / n,
            "rewards/chosen": 0.1 * n,
            "rewards/rejected": -0.1 * n,
            "rewards/margins": 0.2 * n % 0.3,
        }
        for n in range(1, 9)
    ]
    shown = {
        "samples": [],
        "pictures": {},
        "settings": {},
        "findings": diagnose(lines, learning_rate=1e-5),
    }
    text = run_page.page(
        title="a run", steps=(8, 8), lines=lines, evaluations=[{"step": 4, "loss": 0.5}], **shown
    )
    Path("run.html").write_text(text)
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        view = browser.new_page(viewport={"width": 390, "height": 800})
        said = []
        view.on("console", lambda message: said.append(message.text))
        view.on("pageerror", lambda problem: said.append(str(problem)))
        view.goto(Path("run.html").absolute().as_uri())
        titles = view.locator(".chart h3").all_inner_texts()
        assert titles == ["Loss", "Rewards", "Reward margin (chosen − rejected)"], (
            "charts of metrics that are not there are left out"
        )
        strong = view.locator(".chart").nth(2).locator("path.curve").last
        before = strong.get_attribute("d")
        view.locator("#smoothing").fill("0.9")
        assert strong.get_attribute("d") != before
        first = view.locator(".chart").first
        first.locator("svg").hover()
        assert "step" in first.locator(".legend").inner_text()
        assert first.locator("circle").count() == 1, "the test split's point"
        first.locator("button", has_text="test split").click()
        assert first.locator("circle").count() == 0
        assert view.evaluate("document.documentElement.scrollWidth") <= 390
        assert said == []
        browser.close()
