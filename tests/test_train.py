"""train: what a run leaves behind, what it refuses, and that Ctrl-C loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def few_pairs(tmp_path_factory):
    """A prepared folder of 48 embedded pairs."""
    from vlmdpo import prepare
    from vlmdpo.config import PrepareConfig

    folder = tmp_path_factory.mktemp("data") / "few"
    prepare.run(PrepareConfig(limit=48, output_dir=folder))
    return folder


@pytest.fixture(scope="module")
def trained(few_pairs, tmp_path_factory):
    """A finished run of six steps: (folder, report)."""
    from vlmdpo import config, train
    from vlmdpo.models.registry import recipe

    folder = tmp_path_factory.mktemp("run") / "out"
    layer = {"dataset": str(few_pairs), "output_dir": folder, "max_steps": 6, "logging_steps": 1, "set": ["max_grad_norm=0.7"]}
    return folder, train.run(config.build(config.TrainConfig, recipe("tiny", "train"), layer))


def test_a_run_leaves_everything_behind(trained):
    folder, report = trained
    assert set(report) >= {"output_dir", "steps", "loss", "rewards/accuracies", "rewards/margins", "pairs_per_s"}
    assert set(report) >= {"engine", "fallback_reason", "peak_bytes"}
    assert (report["steps"], report["engine"]) == (6, "stock")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: policy and reference agree before the first step
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= set(lines[0])
    weights = load_file(folder / "adapter_model.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in weights.items() if "lora_B" in name)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    assert (folder / "processor_config.json").exists()
    assert not list(folder.glob("*.bin"))  # no pickle beside the adapter
    picture = Image.open(folder / "learning_curves.png")
    assert picture.width > 1000
    assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 10  # something is drawn


def test_the_adapter_answers_through_infer_and_eval(trained, vlmdpo):
    folder, _ = trained
    code, out, _ = vlmdpo("infer", "--adapter", folder, "--compare", "--question", "Is there a star in this image?", "--json")
    assert code == 0
    assert {"id", "image", "question", "answer", "base_answer", "model", "adapter"} <= set(json.loads(out))
    code, out, _ = vlmdpo("eval-amber", "--adapter", folder, "--limit", "40", "--json")
    assert code == 0
    report = json.loads(out)
    assert set(report["scores"]) == {"base", "tuned"}
    assert set(report["comparison"]) >= {"delta_accuracy", "ci95", "mcnemar_p"}
    assert report["coverage"] == 1.0
    answers = json.loads((Path(report["output_dir"]) / "answers_tuned.json").read_text())
    assert len(answers) == 40


def test_full_fine_tuning_moves_every_part(few_pairs, tmp_path, vlmdpo):
    arguments = ["--dataset", few_pairs, "--no-lora", "--max-steps", "2", "--output-dir", tmp_path / "full", "--json"]
    code, out, err = vlmdpo("train", *arguments)
    assert code == 0, err
    assert json.loads(out)["steps"] == 2
    before = load_file(Path(__import__("vlmdpo").__file__).parent / "tiny" / "assets" / "model" / "model.safetensors")
    after = load_file(tmp_path / "full" / "model.safetensors")
    assert before.keys() == after.keys()
    for part in ("vision_model", "connector", "text_model"):
        assert any((before[n].float() - after[n].float()).abs().max() > 0 for n in before if part in n), part


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--set", "max_grad_nrom=1"], 2, "DPOConfig has no field 'max_grad_nrom'. Did you mean 'max_grad_norm'?"),
        (["--set", "max_grad_norm"], 2, "must be key=value"),
        (["--set", "learning_rate=1"], 2, "use --learning-rate"),
        (["--lora-target-modules", "nonsense_proj"], 2, "--lora-target-modules"),
        (["--output-dir", "taken"], 3, "holds something else"),
        (["--output-dir", "file/below"], 3, "file/below"),
        (["--output-dir", "new", "--resume"], 3, "holds no checkpoint"),
        (["--model", "nobody/nothing"], 4, "cannot find 'nobody/nothing'"),
        (["--device", "cuda:1"], 2, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_refusals(arguments, code, says, few_pairs, tmp_path, vlmdpo):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    got, _, err = vlmdpo("train", "--dataset", few_pairs, "--max-steps", "1", *arguments)
    assert got == code, err
    assert says in err.strip().splitlines()[-1]
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"


def test_an_earlier_run_is_not_overwritten_unasked(trained, few_pairs, vlmdpo):
    folder, _ = trained
    code, _, err = vlmdpo("train", "--dataset", few_pairs, "--output-dir", folder, "--max-steps", "1")
    assert code == 3
    assert "add --resume, --overwrite, or give another folder" in err


def test_a_text_model_is_no_vlm(tmp_path, vlmdpo):
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "llama")
    code, _, err = vlmdpo("prepare", "--limit", "2", "--model", tmp_path / "llama")
    assert code == 4
    assert "is a llama model, not a vision-language model" in err


def test_ctrl_c_keeps_a_checkpoint_and_shows_the_next_command(few_pairs, tmp_path):
    out = tmp_path / "stopped"
    steps = ["--num-train-epochs", "500", "--logging-steps", "1", "--per-device-train-batch-size", "4", "--lora-r", "2"]
    command = [sys.executable, "-m", "vlmdpo", "train", "--dataset", str(few_pairs), "--output-dir", str(out), *steps]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"})
    deadline = time.monotonic() + 120
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"vlmdpo train --config {out}/recipe.yaml --resume" in err
    saved = sorted(out.glob("checkpoint-*"))
    assert saved
    stopped_at = int(saved[-1].name.split("-")[1])
    more = ["--config", str(out / "recipe.yaml"), "--resume", "--max-steps", str(stopped_at + 2), "--json"]
    done = subprocess.run([sys.executable, "-m", "vlmdpo", "train", *more], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == stopped_at + 2
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, stopped_at + 3))
