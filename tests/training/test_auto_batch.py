"""Out of memory, provoked: the batch is halved, and the run learns the same."""

import json

import pytest
import torch

from tests.support.engines import pairs, trainer
from tests.support.ranks import CUDA_IS_FULL, FSDP2, full_above, run_groups
from vlmdpo.errors import MemoryBudgetError
from vlmdpo.training import monitor
from vlmdpo.training.run_trainer import RunTrainer

pytestmark = pytest.mark.slow


CUBLAS_IS_FULL = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")


def run(
    tmp_path,
    name,
    monkeypatch,
    *,
    limit=None,
    log=None,
    after=0,
    problem=CUDA_IS_FULL,
    **settings,
):
    rows = pairs(16, seed=3)
    made = trainer(
        "llava", "shared", rows, tmp_path / name, logging_steps=1, learning_rate=1e-2, **settings
    )
    if limit is not None:
        made.enable_auto_batch()
        limited, calls = full_above(limit, problem), []

        def later(self, model, inputs, *rest):
            calls.append(1)
            if log is not None and len(calls) > after:
                log.append(len(inputs["input_ids"]) // 2)
            return (limited if len(calls) > after else compute)(self, model, inputs, *rest)

        compute = RunTrainer._compute_loss
        monkeypatch.setattr(RunTrainer, "_compute_loss", later)
    made.train()
    monkeypatch.undo()
    weights = {
        name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad
    }
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    return made, losses, weights


@pytest.mark.parametrize(
    ("after", "problem"),
    [(0, CUBLAS_IS_FULL), (3, CUDA_IS_FULL)],
    ids=["at once", "in the middle of a step"],
)
def test_a_halved_batch_learns_the_same(after, problem, tmp_path, monkeypatch, capfd):
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
    }
    _, expected, plain = run(tmp_path, "plain", monkeypatch, **settings)
    log = []
    made, losses, weights = run(
        tmp_path, "halved", monkeypatch, limit=2, log=log, after=after, problem=problem, **settings
    )
    assert losses == pytest.approx(expected, rel=1e-4)
    for name, weight in weights.items():
        assert torch.allclose(weight, plain[name], rtol=1e-3, atol=1e-5), name
    assert (made.auto_batch.num_parts, made.auto_batch.per_device_train_batch_size) == (2, 2)
    assert log[0] == 4
    assert max(log[1:]) == 2, "once halved, it stays so"
    assert "continuing with batch 2 and 4 accumulation steps" in " ".join(
        capfd.readouterr().err.split()
    )


def test_metrics_count_every_pair_once(tmp_path, monkeypatch):
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
    }
    plain, _, _ = run(tmp_path, "plain", monkeypatch, **settings)
    halved, _, _ = run(tmp_path, "halved", monkeypatch, limit=1, after=1, **settings)
    assert halved.auto_batch.num_parts == 4
    for one, other in zip(plain.state.log_history, halved.state.log_history, strict=True):
        if "loss" not in one:
            continue
        assert one.keys() == other.keys()
        for name in (
            "num_tokens",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
            "grad_norm",
        ):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


def test_a_single_pair_that_does_not_fit_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(MemoryBudgetError, match="a single pair does not fit into memory"):
        run(
            tmp_path, "out", monkeypatch, limit=0, per_device_train_batch_size=4, num_train_epochs=1
        )


def test_the_command_continues_and_reports_its_batch(tmp_path, vlmdpo, monkeypatch):
    from vlmdpo.commands import prepare
    from vlmdpo.config import PrepareConfig

    prepare.run(PrepareConfig(limit=24, output_dir=tmp_path / "few"))
    monkeypatch.setattr(RunTrainer, "_compute_loss", full_above(3))
    more = [
        "--auto-batch-size",
        "--per-device-train-batch-size",
        "12",
        "--output-dir",
        tmp_path / "out",
        "--json",
    ]
    code, out, err = vlmdpo("train", "--dataset", tmp_path / "few", *more)
    assert code == 0, err
    report = json.loads(out)
    assert (report["steps"], report["per_device_train_batch_size"]) == (2, 3)
    assert "no GPU to plan for: starting with batch 12" in " ".join(err.split())
    monkeypatch.setattr(RunTrainer, "_compute_loss", full_above(0))
    code, _, err = vlmdpo("train", "--dataset", tmp_path / "few", *more, "--overwrite")
    assert code == 5
    assert "a single pair does not fit" in " ".join(err.split())


def test_all_processes_agree_when_one_runs_out(tmp_path):
    from vlmdpo.commands import prepare
    from vlmdpo.config import PrepareConfig

    prepare.run(PrepareConfig(limit=32, output_dir=tmp_path / "few"))
    settings = [
        "train",
        "--dataset",
        "few",
        "--per-device-train-batch-size",
        "4",
        "--gradient-accumulation-steps",
        "2",
    ]
    settings += ["--lora-dropout", "0", "--logging-steps", "1", "--device", "cpu"]
    settings += ["--loss-type", "sigmoid"]  # a mean over pairs, not over the tokens of a part
    plain = {"name": "plain", "processes": 2, "arguments": [*settings, "--output-dir", "plain"]}
    halved = {
        "name": "halved",
        "processes": 2,
        "arguments": [*settings, "--output-dir", "halved", "--auto-batch-size"],
    }
    run_groups([plain, {**halved, "full_above": 2}])
    reports = {
        name: json.loads((tmp_path / name / "train_report.json").read_text())
        for name in ("plain", "halved")
    }
    lines = {
        name: [
            json.loads(line)
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("plain", "halved")
    }
    assert reports["halved"]["per_device_train_batch_size"] == 2
    assert len(lines["plain"]) == len(lines["halved"]) == 2
    for one, other in zip(lines["plain"], lines["halved"], strict=True):
        for metric in ("loss", "grad_norm", "rewards/margins", "num_tokens"):
            assert other[metric] == pytest.approx(one[metric], rel=1e-3, abs=1e-5), metric


def test_estimated_peak_is_printed_beside_the_measured_one():
    assert (
        monitor.compare_peaks(21 * 2**30, 20 * 2**30)
        == "peak memory: 21.00 GiB estimated, 20.00 GiB measured (+5.0%)"
    )


def test_the_batch_size_is_planned_on_the_data_of_the_run(tmp_path, monkeypatch):
    for name, value in {**FSDP2, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)  # what a launcher sets must not reach the simulation
    from accelerate import PartialState

    from vlmdpo.commands import prepare
    from vlmdpo.config import PrepareConfig, TrainConfig
    from vlmdpo.errors import ModelError
    from vlmdpo.training import memory_forecast

    prepare.run(PrepareConfig(limit=8, output_dir=tmp_path / "few"))
    before = dict(PartialState._shared_state)
    config = TrainConfig(per_device_train_batch_size=1, gradient_accumulation_steps=2)
    found = memory_forecast.plan_batch(config, tmp_path / "few", 2 * 2**30, "bfloat16")
    assert found["plan"]["per_device_train_batch_size"] == 2
    assert found["image"] == [72, 72]
    assert dict(PartialState._shared_state) == before, (
        "the simulation leaves this process as it was"
    )
    with pytest.raises(ModelError, match=r"cannot estimate a batch size \(.* is not a folder"):
        memory_forecast.plan_batch(config, tmp_path / "absent", 2**30, "bfloat16")
