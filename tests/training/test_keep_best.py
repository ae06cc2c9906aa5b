"""The weights that are best on the test split are the result, said with what judged them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from vlmdpo.config import TrainConfig
from vlmdpo.errors import ConfigError
from vlmdpo.report.diagnosis import best_kept
from vlmdpo.training import checkpoints
from vlmdpo.training.keep_best import KeepBest

OUT = Path("out")


def _after(losses, *, patience=None, by="loss", lost=()):
    """A callback after evaluations at steps 2, 4 ..., and what it asked for at each."""
    monitor = SimpleNamespace(evaluations=[])
    keep = KeepBest(OUT, by, patience, monitor)
    asked = []
    for step, loss in enumerate(losses, start=1):
        monitor.evaluations.append(
            {"step": 2 * step, "loss": loss, "rewards/accuracies": loss, "rewards/margins": loss}
        )
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        keep.on_evaluate(None, SimpleNamespace(global_step=2 * step), control)
        if control.should_save and 2 * step not in lost:
            (OUT / checkpoints.checkpoint_name(2 * step)).mkdir(parents=True)
        asked.append("save" if control.should_save else "stop" * control.should_training_stop)
    return keep, asked


def test_each_best_evaluation_is_saved():
    keep, asked = _after([0.7, 0.5, 0.6, 0.4, 0.4])
    assert asked == ["save", "save", "", "save", ""]
    assert keep.best()["step"] == 8


@pytest.mark.parametrize("by", ["accuracy", "margin"])
def test_more_is_better_of_other_figures(by):
    keep, asked = _after([0.5, 0.7, 0.6], by=by)
    assert asked == ["save", "save", ""]
    assert keep.summary()["judged_by"] == {"accuracy": "eval_rewards/accuracies"}.get(
        by, "eval_rewards/margins"
    )


def test_patience_ends_a_run_that_gets_no_better():
    keep, asked = _after([0.5, 0.6, 0.7], patience=2)
    assert asked == ["save", "", "stop"]
    assert keep.summary() == {
        "step": 2,
        "judged_by": "eval_loss",
        "value": 0.5,
        "last_step": 6,
        "last_value": 0.7,
        "evaluations": 3,
        "stopped_early": True,
    }
    [finding] = best_kept(keep.summary())
    assert "eval_loss 0.5000, the best of 3 evaluations" in finding.seen
    assert best_kept(None) == []


def test_a_best_step_without_its_checkpoint_cannot_be_returned_to():
    keep, _ = _after([0.5, 0.6, 0.7], lost=(2,))
    assert keep.best()["step"] == 4


def test_the_best_checkpoint_is_never_removed():
    for step in (2, 4, 6, 8):
        (OUT / f"checkpoint-{step}").mkdir(parents=True)
    checkpoints._remove_oldest(OUT, 2, 2)
    assert [path.name for path in checkpoints.list_checkpoints(OUT)] == [
        "checkpoint-2",
        "checkpoint-6",
        "checkpoint-8",
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"keep_best": True, "eval_steps": 0},
        {"early_stopping": 2},
        {"keep_best": True, "best_by": "chair"},
        {"keep_best": True, "early_stopping": 0},
        {"keep_best": True, "num_processes": 2, "strategy": "zero2"},
    ],
)
def test_settings_that_cannot_be(settings):
    with pytest.raises(ConfigError):
        TrainConfig(**settings)


@pytest.mark.slow
def test_a_run_ends_with_its_best_weights(vlmdpo):
    prepare = ["prepare", "--limit", "16", "--test-size", "8", "--output-dir", "data"]
    assert vlmdpo(*prepare)[0] == 0
    arguments = ["train", "--dataset", "data", "--device", "cpu", "--output-dir", "out"]
    arguments += ["--per-device-train-batch-size", "4", "--learning-rate", "0.05"]
    arguments += ["--max-steps", "12", "--eval-steps", "1", "--save-total-limit", "1"]
    code, out, err = vlmdpo(*arguments, "--keep-best", "--early-stopping", "3", "--json")
    assert code == 0, err
    report = json.loads(out)
    best = report["best"]
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    evaluated = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert best["value"] == min(evaluated.values()) == evaluated[best["step"]]
    assert best["step"] < best["last_step"], "the rate is so high that it gets worse"
    assert best["stopped_early"]
    assert report["diagnosis"][-1]["name"] == "best_kept"
    kept = load_file(f"out/checkpoint-{best['step']}/adapter_model.safetensors")
    saved = load_file("out/adapter_model.safetensors")
    assert all((saved[name] == weight).all() for name, weight in kept.items())
    assert f"The result is the weights of step {best['step']}" in Path("out/run.html").read_text()
