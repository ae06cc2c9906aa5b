"""train: what a run writes, what it refuses, and that Ctrl-C loses nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def few_pairs(tmp_path_factory):
    """A prepared folder of 48 embedded pairs."""
    from vlmdpo.commands import prepare
    from vlmdpo.config import PrepareConfig

    folder = tmp_path_factory.mktemp("data") / "few"
    prepare.run(PrepareConfig(limit=48, output_dir=folder))
    return folder


@pytest.fixture(scope="module")
def trained(few_pairs, tmp_path_factory):
    """A finished run of six steps: (folder, report)."""
    from vlmdpo import config
    from vlmdpo.commands import train
    from vlmdpo.config import recipes
    from vlmdpo.models.registry import recipe

    folder = tmp_path_factory.mktemp("run") / "out"
    layer = {
        "dataset": str(few_pairs),
        "output_dir": folder,
        "max_steps": 6,
        "logging_steps": 1,
        "loss_type": "sigmoid",
        "set": ["max_grad_norm=0.7"],
    }
    return folder, train.run(recipes.build(config.TrainConfig, recipe("tiny", "train"), layer))


def test_a_run_leaves_everything_behind(trained):
    folder, report = trained
    assert set(report) >= {
        "output_dir",
        "steps",
        "loss",
        "rewards/accuracies",
        "rewards/margins",
        "pairs_per_s",
    }
    assert set(report) >= {"engine", "fallback_reason", "peak_bytes"}
    assert (report["steps"], report["engine"], report["fallback_reason"]) == (6, "shared", None)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[0]["loss"] == pytest.approx(
        0.6931, abs=1e-3
    )  # ln 2: policy and reference agree before the first step
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= set(
        lines[0]
    )
    weights = load_file(folder / "adapter_model.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in weights.items() if "lora_B" in name)
    assert (
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "tiny"
    )
    assert (folder / "processor_config.json").exists()
    assert not list(folder.glob("*.bin"))  # no pickle beside the adapter
    picture = Image.open(folder / "learning_curves.png")
    assert picture.width > 1000
    assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 10  # something is drawn


def test_a_run_says_what_its_rows_share_and_what_ran(trained):
    folder, report = trained
    sharing, tokens = report["sharing"], report["tokens"]
    assert (sharing["pairs"], sharing["prompts"], sharing["answers"]) == (48, 48, 96)
    assert sharing["images"] < 48
    assert sharing["is_grouped"]
    # Six steps of sixteen rows are two epochs.
    assert tokens["stock"] == 2 * sharing["epoch"]["stock"]
    assert tokens["run"] < tokens["stock"]
    page = (folder / "run.html").read_text(encoding="utf-8")
    assert f"The 48 pairs have {sharing['images']} images, 48 prompts and 96 answers;" in page
    assert (
        f"It has computed {tokens['run']:,} tokens where stock rows hold {tokens['stock']:,}"
        in page
    )
    assert json.loads((folder / "train_report.json").read_text())["tokens"] == tokens


def test_the_adapter_answers_through_infer_and_eval(trained, vlmdpo):
    folder, _ = trained
    code, out, _ = vlmdpo(
        "infer",
        "--adapter",
        folder,
        "--compare",
        "--question",
        "Is there a star in this image?",
        "--json",
    )
    assert code == 0
    assert {"id", "image", "question", "answer", "base_answer", "model", "adapter"} <= set(
        json.loads(out)
    )
    code, out, _ = vlmdpo(
        "eval-amber", "--adapter", folder, "--limit", "40", "--task", "discriminative", "--json"
    )
    assert code == 0
    report = json.loads(out)
    assert set(report["scores"]) == {"base", "tuned"}
    assert set(report["comparison"]) >= {"delta_accuracy", "ci95", "mcnemar_p"}
    assert report["coverage"] == 1.0
    answers = json.loads((Path(report["output_dir"]) / "answers_tuned.json").read_text())
    assert len(answers) == 40


def test_full_fine_tuning_moves_every_part(few_pairs, tmp_path, vlmdpo):
    arguments = [
        "--dataset",
        few_pairs,
        "--no-lora",
        "--max-steps",
        "2",
        "--output-dir",
        tmp_path / "full",
        "--json",
    ]
    code, out, err = vlmdpo("train", *arguments)
    assert code == 0, err
    assert json.loads(out)["steps"] == 2
    before = load_file(
        Path(__import__("vlmdpo").__file__).parent
        / "tiny"
        / "assets"
        / "model"
        / "model.safetensors"
    )
    after = load_file(tmp_path / "full" / "model.safetensors")
    assert before.keys() == after.keys()
    for part in ("vision_model", "connector", "text_model"):
        assert any(
            (before[n].float() - after[n].float()).abs().max() > 0 for n in before if part in n
        ), part


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (
            ["--set", "max_grad_nrom=1"],
            2,
            "DPOConfig has no field 'max_grad_nrom'. Did you mean 'max_grad_norm'?",
        ),
        (["--set", "max_grad_norm"], 2, "must be key=value"),
        (["--set", "ddp_timeout=soon"], 2, "'ddp_timeout' takes a number, not 'soon'"),
        (["--set", "learning_rate=1"], 2, "use --learning-rate"),
        (["--lora-target-modules", "nonsense_proj"], 2, "--lora-target-modules"),
        (["--output-dir", "taken"], 3, "holds something else"),
        (["--output-dir", "file/below"], 3, "file/below"),
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


def test_an_earlier_run_is_not_overwritten_unless_asked(trained, few_pairs, vlmdpo):
    folder, _ = trained
    code, _, err = vlmdpo(
        "train", "--dataset", few_pairs, "--output-dir", folder, "--max-steps", "1"
    )
    assert code == 3
    assert "add --resume or --overwrite, or choose another folder" in err


def test_a_text_model_is_refused(tmp_path, vlmdpo):
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "llama")
    code, _, err = vlmdpo("prepare", "--limit", "2", "--model", tmp_path / "llama")
    assert code == 4
    assert "is a llama model, not a vision-language model" in err


def test_ctrl_c_keeps_a_checkpoint_and_shows_the_next_command(few_pairs, tmp_path, vlmdpo):
    out = tmp_path / "stopped"
    steps = [
        "--num-train-epochs",
        "500",
        "--logging-steps",
        "1",
        "--per-device-train-batch-size",
        "4",
        "--lora-r",
        "2",
    ]
    command = [
        sys.executable,
        "-m",
        "vlmdpo",
        "train",
        "--dataset",
        str(few_pairs),
        "--output-dir",
        str(out),
        *steps,
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    )
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
    more = ["--config", out / "recipe.yaml", "--resume", "--max-steps", stopped_at + 2, "--json"]
    code, stdout, err = vlmdpo("train", *more)
    assert code == 0, err
    assert json.loads(stdout)["steps"] == stopped_at + 2
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(
        range(1, stopped_at + 3)
    )


def test_stock_and_shared_log_the_same(few_pairs, tmp_path, vlmdpo):
    lines = {}
    for engine in ("stock", "shared"):
        out = tmp_path / engine
        more = [
            "--max-steps",
            "3",
            "--logging-steps",
            "1",
            "--lora-dropout",
            "0",
            "--no-group-by-image",  # as the stock engine does not
            "--engine",
            engine,
            "--json",
        ]
        code, stdout, err = vlmdpo("train", "--dataset", few_pairs, "--output-dir", out, *more)
        assert code == 0, err
        assert json.loads(stdout)["engine"] == engine
        lines[engine] = [
            json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
        ]
    for stock, shared in zip(lines["stock"], lines["shared"], strict=True):
        assert stock.keys() == shared.keys()
        for name, value in stock.items():
            assert shared[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize(
    ("scope", "parts"), [("language", {"text_model"}), ("connector", {"text_model", "connector"})]
)
def test_lora_scope_places_the_adapter(scope, parts, few_pairs, tmp_path, vlmdpo):
    out = tmp_path / "out"
    more = ["--max-steps", "1", "--lora-scope", scope, "--output-dir", out, "--json"]
    code, _, err = vlmdpo("train", "--dataset", few_pairs, *more)
    assert code == 0, err
    names = load_file(out / "adapter_model.safetensors")
    assert {
        part
        for name in names
        for part in ("vision_model", "connector", "text_model")
        if f".{part}." in name
    } == parts
    said = " ".join(err.split())
    assert "trainable parameters (" in said
    assert ("connector " in said.split("trainable parameters (")[1].split(")")[0]) == (
        scope == "connector"
    )


@pytest.mark.parametrize(
    ("over_length", "done"), [("drop", {"dropped": 3}), ("trim", {"trimmed": 2, "dropped": 1})]
)
def test_rows_over_the_limit_are_listed_and_dropped_or_trimmed(over_length, done, tmp_path, vlmdpo):
    from PIL import Image as Picture

    (tmp_path / "images").mkdir()
    rows = []
    for i in range(6):
        Picture.new("RGB", (64, 64), (40 * i, 90, 10)).save(tmp_path / "images" / f"{i}.png")
        question = "what is this " * (40 if i == 5 else 1)
        answers = {"chosen": "a red star " * (30 if i in (1, 3) else 2), "rejected": "a moon"}
        rows.append({"image": f"images/{i}.png", "question": question, **answers})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [
        "--max-length",
        "60",
        "--over-length",
        over_length,
        "--max-steps",
        "1",
        "--output-dir",
        "out",
        "--json",
    ]
    code, out, err = vlmdpo("train", "--dataset", "pairs.jsonl", *more)
    assert code == 0, err
    assert json.loads(out)["over_length"] == done
    listed = [
        json.loads(line)
        for line in (tmp_path / "out" / "over_length.jsonl").read_text().splitlines()
    ]
    assert {line["row"] for line in listed} == {1, 3, 5}
    assert all(line["prompt"] + max(line["chosen"], line["rejected"]) > 60 for line in listed)
    assert "3 of 6 rows over --max-length 60" in " ".join(err.split())
    code, _, err = vlmdpo(
        "train", "--dataset", "pairs.jsonl", "--max-length", "10", "--output-dir", "none"
    )
    assert code == 3
    assert "every row is longer" in err
    assert not (tmp_path / "none").exists()


def test_checkpointing_auto_stays_below_stock(few_pairs, tmp_path, vlmdpo):
    more = [
        "--max-steps",
        "1",
        "--gradient-checkpointing",
        "--checkpointing",
        "auto",
        "--output-dir",
        tmp_path / "out",
        "--json",
    ]
    code, out, err = vlmdpo("train", "--dataset", few_pairs, *more)
    assert code == 0, err
    assert 0 <= json.loads(out)["checkpointed_layers"] <= 4
    said = " ".join(err.split())
    peaks = re.search(r"peaks at ([\d.]+) MB, stock TRL's at ([\d.]+) MB", said)
    assert peaks, said
    assert float(peaks[1]) <= float(peaks[2])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--checkpointing", "9", "--gradient-checkpointing"], "has 4 layers"),
        (["--checkpointing", "some"], "all, auto, or a number"),
        (["--checkpointing", "2", "--no-gradient-checkpointing"], "needs --gradient-checkpointing"),
        (["--lora-scope", "tongue"], "unknown value 'tongue'"),
        (["--over-length", "cut"], "unknown value 'cut'"),
    ],
)
def test_engine_options_that_contradict_each_other(arguments, says, few_pairs, tmp_path, vlmdpo):
    code, _, err = vlmdpo(
        "train", "--dataset", few_pairs, "--output-dir", tmp_path / "new", *arguments
    )
    assert code == 2, err
    assert says in " ".join(err.split())
    assert not (tmp_path / "new").exists()


def test_a_split_of_prepared_data_is_said_to_have_no_effect(monkeypatch, capsys):
    from vlmdpo.commands import train
    from vlmdpo.config import TrainConfig

    manifest = {"key": "k", "split": "train[:9]"}
    monkeypatch.setattr("vlmdpo.data.store.read_manifest", lambda folder: manifest)
    for split, is_said in (("train", False), ("train[:9]", False), ("test", True)):
        train._prepared(TrainConfig(dataset="d", split=split))
        said = " ".join(capsys.readouterr().err.split())
        assert ("--split test has no effect: 'd' is prepared already" in said) == is_said
