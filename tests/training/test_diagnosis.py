"""The diagnosis does not advise what was done, and a plan refuses what cannot be done."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vlmdpo.config import TrainConfig
from vlmdpo.report.diagnosis import diagnose
from vlmdpo.training import non_finite
from vlmdpo.training.finite_check import NonFiniteLoss
from vlmdpo.training.monitor import TrainingMonitor


def _lines(count=8, **metrics):
    plain = {"loss": 0.5, "rewards/accuracies": 0.9, "rewards/margins": 1.0}
    return [
        {"step": step, **plain, **{f"rewards/{k}": v for k, v in metrics.items()}}
        for step in range(1, count + 1)
    ]


def _tries(lines, evaluations=(), **settings):
    [found] = diagnose(
        lines, evaluations, learning_rate=1e-5, settings=TrainConfig(max_steps=8, **settings)
    )
    assert found.tries
    return found.name, " | ".join(found.tries)


BOTH_FALL = _lines(chosen=-2.0, rejected=-3.0)
ONLY_REJECTED = _lines(chosen=0.0, rejected=-1.0)
CHANCE = _lines(chosen=-0.5, rejected=-0.5, accuracies=0.5, margins=0.0)
UNMOVED = _lines(chosen=0.0, rejected=0.0, margins=0.0)
DIVERGED = [{**line, "loss": 0.69 + line["step"]} for line in BOTH_FALL]
WORSE = [{"step": step, "loss": loss} for step, loss in ((2, 0.4), (4, 0.6), (8, 0.9))]
FALLING = [{**line, "loss": 0.6 - 0.05 * line["step"]} for line in _lines(chosen=0.6)]


@pytest.mark.parametrize(
    ("lines", "evaluations", "advice", "followed"),
    [
        (BOTH_FALL, (), "--loss sigmoid,sft", {"loss_type": "sigmoid,sft"}),
        (BOTH_FALL, (), "--loss mpo", {"loss_type": "mpo"}),
        (BOTH_FALL, (), "--loss mdpo", {"loss_type": "mdpo"}),
        (ONLY_REJECTED, (), "--loss apo_zero", {"loss_type": "apo_zero"}),
        (CHANCE, (), "--loss robust", {"loss_type": "robust", "label_smoothing": 0.2}),
        (UNMOVED, (), "--lora-scope all", {"lora_scope": "all"}),
        (DIVERGED, (), "--warmup-steps 0.1", {"warmup_steps": 0.1}),
        (DIVERGED, (), "max_grad_norm=0.5", {"set": ("max_grad_norm=0.3",)}),
        (FALLING, WORSE, "--keep-best", {"keep_best": True}),
        (FALLING, WORSE, "--lora-r 8", {"lora_r": 8}),
        (FALLING, WORSE, "--lora-dropout 0.1", {"lora": False}),
        (BOTH_FALL[:2], (), "--logging-steps 1", {"logging_steps": 1}),
    ],
)
def test_advice_that_was_followed_is_not_given_again(lines, evaluations, advice, followed):
    before = {"lora_scope": "language"} if advice.startswith("--lora-scope") else {}
    name, tries = _tries(lines, evaluations, **before)
    assert advice in tries
    assert _tries(lines, evaluations, **followed)[0] == name
    assert advice not in _tries(lines, evaluations, **followed)[1]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--learning-rate", "inf"], 2, "--learning-rate: 'inf' is not a finite number"),
        (["--num-train-epochs", "nan"], 2, "'nan' is not a finite number"),
        (["--gpu", "h1000"], 2, "'h1000' is neither a known GPU nor an amount"),
        (["--gpu", "8xfoo"], 2, "'foo' is neither a known GPU nor an amount"),
        (["--gpu", "1.2.3GiB"], 2, "neither a known GPU nor an amount"),
        (["--dataset", "scense"], 3, "'scense' is not a file, a folder or a Hub id"),
        (["--dataset", "outputs/data/nope"], 3, "'outputs/data/nope' is not a file, a folder"),
        (["--eval-steps", "10"], 2, "--eval-steps: this data has no test split"),
        (["--keep-best"], 2, "--keep-best: this data has no test split"),
        (["--lora-target-modules", "q_porj"], 2, "no layer 'q_porj' in this model. Did you mean"),
        (["--lora-target-modules", "q_proj,nope"], 2, "no layer 'nope' in this model"),
        (
            ["--model", "llava-1.5-7b", "--dataset", "rlaif-v", "--lora-target-modules", "c_attn"],
            2,
            "no layer 'c_attn' in this model",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_plan_refuses_what_is_not_there(arguments, code, says, vlmdpo):
    got, _, err = vlmdpo("train", "--dry-run", *arguments)
    assert got == code, err
    assert says in err


def test_a_plan_takes_what_is_there(vlmdpo):
    for names in ("q_proj,v_proj", "text_model.layers.0.self_attn.q_proj", "lm_head"):
        code, _, err = vlmdpo("train", "--dry-run", "--lora-target-modules", names)
        assert code == 0, err


def test_the_last_metrics_are_those_of_the_last_step():
    """Logged every ten steps, a run of three would show its first."""
    monitor = TrainingMonitor(Path("metrics.jsonl"))
    args = SimpleNamespace(world_size=1, device=torch.device("cpu"))
    logged = []
    for step in (2, 3):
        control = SimpleNamespace(should_log=False)
        monitor.on_step_end(args, SimpleNamespace(global_step=step, max_steps=3), control)
        logged.append(control.should_log)
    assert logged == [False, True]


def test_weights_that_were_broken_before_a_step_are_not_the_learning_rates_fault():
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, torch.nan)
    setup = SimpleNamespace(
        is_sharded=False,
        monitor=SimpleNamespace(began_at=4),
        trainer=SimpleNamespace(model=model),
    )
    message = str(non_finite.explain_non_finite_loss(setup, NonFiniteLoss([1], 5), Path("out")))
    assert "because weights held NaN or infinity before it: weight" in message
    assert "--learning-rate" not in message
    assert non_finite._broken_before(setup, 6) == []


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ({}, "vlmdpo eval-amber --adapter out/run"),
        (
            {"model": "idefics2-8b"},
            "vlmdpo eval-amber --model idefics2-8b --adapter out/run",
        ),
        ({"lora": False}, "vlmdpo eval-amber --model out/run"),
    ],
)
def test_the_next_command_names_what_was_trained(options, command):
    from vlmdpo.report.diagnosis import Finding, best_kept, of_this_model
    from vlmdpo.training.results import evaluation_command

    said = evaluation_command(Path("out/run"), TrainConfig(**options))
    assert said == command
    one = Finding("learning", "good", "t", "s", "m", ("judge it: vlmdpo eval-amber",))
    assert of_this_model([one], said)[0].tries == (f"judge it: {command}",)
    assert best_kept(None) == []
