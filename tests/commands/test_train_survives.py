"""train when things go wrong: kills, signals, full disks, non-finite losses, dead workers."""

import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.support.killing import KILLS, rounds
from vlmdpo import ui
from vlmdpo.engine.collate import PairCollator
from vlmdpo.training.monitor import TrainingMonitor

pytestmark = pytest.mark.slow

_PATIENCE_S = 600  # machines can be slow
_FEW = [
    "--dataset",
    "data",
    "--per-device-train-batch-size",
    "2",
    "--gradient-accumulation-steps",
    "2",
    "--logging-steps",
    "1",
]
_FEW += ["--device", "cpu"]


@pytest.fixture
def data(vlmdpo):
    code, _, err = vlmdpo("prepare", "--limit", "20", "--test-size", "4", "--output-dir", "data")
    assert code == 0, err


def test_killed_at_any_point_a_resumed_run_ends_with_the_same_adapter(data):
    ends = rounds(
        *("train", "KILL", KILLS, *_FEW),
        "--max-steps",
        "4",
        "--save-steps",
        "2",
        "--eval-steps",
        "3",
        "--sample-every",
        "3",
        "--resume",
        timeout_s=_PATIENCE_S,
    )
    assert ends.count("killed") >= KILLS // 2


def test_sigterm_saves_within_a_step_and_the_resumed_run_ends_with_the_same_adapter(data):
    """Most signals arrive during accumulation, whose random numbers must be drawn again."""
    settings = [
        "--gradient-accumulation-steps",
        "8",
        "--lora-dropout",
        "0.3",
        "--max-steps",
        "3",
        "--save-steps",
        "100",
    ]
    ends = rounds(*("train", "TERM", KILLS, *_FEW), *settings, "--resume", timeout_s=_PATIENCE_S)
    assert set(ends) <= {"75", "finished"}
    assert "75" in ends


def test_sigterm_is_preemption_even_if_a_library_turns_it_into_another_error(
    data, vlmdpo, monkeypatch
):
    def told(*_):
        try:
            Path("out").mkdir()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except BaseException as problem:
            raise RuntimeError(
                "Failed to import a module because of the following error"
            ) from problem

    monkeypatch.setattr("vlmdpo.training.build.build_setup", told)
    handler = signal.getsignal(signal.SIGTERM)
    code, _, err = vlmdpo("train", *_FEW, "--output-dir", "out")
    assert code == 75, err
    assert "SIGTERM outside training; checkpoints are kept" in err.splitlines()[-1]
    assert not Path("out").exists()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_sigterm_is_preemption_while_libraries_are_imported():
    program = """
        import os, signal, sys, time
        class Told:
            def find_spec(self, name, *_):
                if name == "torch":
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(60)
        from vlmdpo import cli
        sys.meta_path.insert(0, Told())
        sys.exit(cli.run(["train", "--dataset", "scenes", "--device", "cpu"]))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S)
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr


def test_a_signal_in_the_middle_of_a_line_stops_the_run_and_is_reported(monkeypatch, capfd):
    class Terminal(io.RawIOBase):
        def writable(self):
            return True

        def write(self, text):
            if not lines:
                os.kill(os.getpid(), signal.SIGTERM)
            lines.append(bytes(text))
            return len(text)

    lines = []
    monkeypatch.setattr(
        sys, "stderr", io.TextIOWrapper(io.BufferedWriter(Terminal()), line_buffering=True)
    )
    monitor = TrainingMonitor(Path("metrics.jsonl"))
    with monitor.catching_signals():
        ui.say("step 1/150: loss 0.6931")
    assert monitor.stopped_by == signal.SIGTERM
    assert lines == [b"step 1/150: loss 0.6931\n"]
    assert capfd.readouterr().err == "warning: SIGTERM: saving a checkpoint\n"


def test_a_full_disk_leaves_the_last_complete_checkpoint(data, vlmdpo):
    assert (
        vlmdpo("train", *_FEW, "--output-dir", "out", "--max-steps", "1", "--save-steps", "2")[0]
        == 0
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (2_500_000, before[1])
    )  # room for the adapter, not for the optimizer
    try:
        code, _, err = vlmdpo(
            "train",
            *_FEW,
            "--output-dir",
            "out",
            "--max-steps",
            "3",
            "--save-steps",
            "2",
            "--resume",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 3, err
    assert "cannot write checkpoint-2 in 'out': the write was cut short (" in err.splitlines()[-1]
    assert "checkpoint-1 is intact; continue from it with --resume" in err.splitlines()[-1]
    assert [path.name for path in Path("out").glob("*checkpoint*")] == ["checkpoint-1"]
    assert not list(Path("out").glob(".*"))
    code, _, err = vlmdpo(
        "train", *_FEW, "--output-dir", "out", "--max-steps", "3", "--save-steps", "2", "--resume"
    )
    assert code == 0, err
    assert "resuming from checkpoint-1" in err
    assert not list(Path("out").rglob("training_args.bin"))


def test_a_row_that_makes_the_loss_non_finite_is_named(data, vlmdpo, monkeypatch):
    plain = PairCollator.__call__
    bad = max(
        range(16), key=lambda row: (-len(_answers(row)), row)
    )  # the checks before training take the first long ones

    def poisoned(self, examples):
        batch = plain(self, examples)
        for place, example in enumerate(examples):
            if example.get("row") == bad:
                batch["pixel_values"][place] = float("nan")
        return batch

    monkeypatch.setattr(PairCollator, "__call__", poisoned)
    code, _, err = vlmdpo(
        "train", *_FEW, "--output-dir", "out", "--num-train-epochs", "1", "--no-reference-cache"
    )
    assert code == 4, err
    said = err.splitlines()[-1]
    assert f"is not finite, because of row {bad}, counted from 0 (look at it: " in said
    assert f"vlmdpo prepare --show {bad})" in said
    code, _, err = vlmdpo(
        "train", *_FEW, "--output-dir", "out", "--overwrite"
    )  # the reference's own log-probs
    assert code == 4
    assert f"because of row {bad}, " in err.splitlines()[-1]


def _answers(row):
    from vlmdpo.data import store

    example = store.load(Path("data"))[row]
    return min(str(example["chosen"]), str(example["rejected"]), key=len)


def test_a_learning_rate_that_breaks_the_weights_is_an_error(data, vlmdpo):
    settings = [
        "--learning-rate",
        "1e20",
        "--set",
        "max_grad_norm=0",
        "--save-steps",
        "1",
        "--num-train-epochs",
        "1",
    ]
    code, _, err = vlmdpo("train", *_FEW, "--output-dir", "out", *settings)
    assert code == 4, err
    said = "after step 1 the loss on the test split is not finite, in 2 of the 2 rows of a batch"
    assert said in err.splitlines()[-1]
    code, _, err = vlmdpo(
        "train", *_FEW, "--output-dir", "out", *settings, "--eval-steps", "0", "--overwrite"
    )
    assert code == 4, err
    assert "is not finite, for every row of its batch" in err.splitlines()[-1]
    assert (
        "lower --learning-rate and continue from checkpoint-1 with --resume" in err.splitlines()[-1]
    )


def test_a_dead_data_worker_is_an_error_not_a_hang(data, vlmdpo, monkeypatch):
    from torch.utils.data import get_worker_info

    plain = PairCollator.__call__

    def deadly(self, examples):
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, examples)

    monkeypatch.setattr(PairCollator, "__call__", deadly)
    code, _, err = vlmdpo("train", *_FEW, "--output-dir", "out", "--dataloader-num-workers", "1")
    assert code == 3, err
    assert "one of --dataloader-num-workers 1 died at step 1" in err.splitlines()[-1]


def test_resuming_with_other_settings_warns_and_a_finished_run_takes_no_step(data, vlmdpo):
    code, _, err = vlmdpo("train", *_FEW, "--output-dir", "out", "--max-steps", "2", "--resume")
    assert code == 0, err
    assert "no checkpoint in 'out' yet: starting from the beginning" in err
    adapter = Path("out/adapter_model.safetensors").read_bytes()
    code, out, err = vlmdpo(
        "train", *_FEW, "--output-dir", "out", "--max-steps", "2", "--resume", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["steps"] == 2
    assert Path("out/adapter_model.safetensors").read_bytes() == adapter
    assert "other settings" not in err
    code, _, err = vlmdpo(
        "train", *_FEW, "--output-dir", "out", "--max-steps", "3", "--beta", "0.2", "--resume"
    )
    assert code == 0, err
    assert (
        "--resume with other settings than the run started with: max_steps 2 → 3, beta 0.1 → 0.2"
        in err
    )


def test_nothing_is_sent_unless_asked_and_trackers_get_the_metrics(data, vlmdpo, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    settings = [*_FEW, "--output-dir", "out", "--max-steps", "2"]
    code, _, err = vlmdpo("train", *settings)
    assert code == 0, err
    assert not list(Path(".").rglob("events.out.*"))
    code, _, err = vlmdpo("train", *settings, "--overwrite", "--report-to", "tensorboard")
    assert code == 0, err
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = Path(".").rglob("events.out.*")
    seen = EventAccumulator(str(events)).Reload()
    assert {"train/loss", "train/rewards/margins"} <= set(seen.Tags()["scalars"])
    assert [point.step for point in seen.Scalars("train/loss")] == [1, 2]
    code, _, err = vlmdpo("train", *settings, "--overwrite", "--report-to", "wandb")
    assert code == 6
    assert "--report-to wandb needs a package: pip install wandb" in err
    code, _, err = vlmdpo("train", *settings, "--overwrite", "--report-to", "tensorbord")
    assert code == 2
    assert "Did you mean 'tensorboard'?" in err
