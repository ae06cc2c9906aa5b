"""Prompts are the same from `prepare` to `infer`, and a change of them reaches every cache."""

import datetime
import json
from pathlib import Path

import pytest

from tests.support import templates
from tests.support.engines import pairs
from vlmdpo.cli import run as cli
from vlmdpo.commands import infer, prepare, train
from vlmdpo.config import InferConfig, PrepareConfig, TrainConfig
from vlmdpo.models import rendering
from vlmdpo.tiny import random_models

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model whose template writes the date and takes answers as texts, and data of two rows."""
    monkeypatch.chdir(tmp_path)
    model, processor = random_models.make("llava")
    processor.chat_template = templates.DATED.replace(
        templates.PARTS, templates.PLAIN_ANSWERS
    ).replace("IMAGE", "<image>")
    model.save_pretrained("model")
    processor.save_pretrained("model")
    rows = []
    for number, row in enumerate(pairs(2)):
        row["images"][0].save(f"{number}.png")
        texts = {
            name: row[name][0]["content"][-1]["text"] for name in ("prompt", "chosen", "rejected")
        }
        rows.append({"image": f"{number}.png", **texts})
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def today(monkeypatch, day):
    monkeypatch.setattr("vlmdpo.models.template_probe._today", lambda: datetime.date(2026, 3, day))


def prepared(**options):
    config = PrepareConfig(
        dataset="rows.jsonl", model="./model", output_dir=Path("data"), **options
    )
    return prepare.run(config)


def trained(name, **options):
    """Loss of the first step of a short run, and how many reference log-probs it found."""
    train.run(
        TrainConfig(
            dataset="data",
            model="./model",
            output_dir=Path(name),
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=1,
            sample_every=0,
            logging_steps=1,
            **options,
        )
    )
    return json.loads(Path(name, "metrics.jsonl").read_text().splitlines()[0])["loss"]


def test_prompts_keep_the_date_of_their_data(folder, monkeypatch, capsys):
    today(monkeypatch, 5)
    first = prepared()
    assert "Today is 05 Mar 2026." in first["example"]["prompt"]
    assert "'type'" not in first["example"]["chosen"]
    assert first["example"]["loss_tokens"]["chosen"][0] != "["
    today(monkeypatch, 6)
    assert prepared()["reused"]
    for name in ("one", "two"):
        assert trained(name) == pytest.approx(0.6931, abs=1e-3)
    assert "those of 4 answers found" in capsys.readouterr().err  # by the second run
    assert json.loads(Path("one", rendering.RENDERING).read_text())["date"] == "2026-03-05"
    asked = []
    monkeypatch.setattr(
        "vlmdpo.engine.generate.render_question",
        lambda *args: asked.append(rendering.render_question(*args)) or asked[-1],
    )
    for adapter in (Path("one"), None):
        infer.run(
            InferConfig(
                model="./model",
                adapter=adapter,
                image=Path("0.png"),
                question="q",
                max_new_tokens=1,
            )
        )
    assert [text.splitlines()[0] for text in asked] == [
        "Today is 05 Mar 2026.",
        "Today is 06 Mar 2026.",
    ]


def test_another_system_message_computes_reference_log_probs_anew(folder, monkeypatch, capsys):
    prepared()
    assert trained("plain") == pytest.approx(0.6931, abs=1e-3)
    assert trained("brief", system="Be brief.") == pytest.approx(0.6931, abs=1e-3)
    assert "answers found" not in capsys.readouterr().err
    read = rendering.read_settings(Path("brief"))
    assert read is not None
    assert read.system == "Be brief."


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "--chat-template-kwargs: not valid JSON"),
        ("[1]", "--chat-template-kwargs: give names and values"),
        ('{"enable_thinking": true}', "has no variable 'enable_thinking'"),
    ],
)
def test_variables_that_cannot_be_used(folder, given, message, capsys):
    assert cli(["infer", "--model", "tiny", "--chat-template-kwargs", given]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_file_of_answers_is_continued_with_the_same_prompts_only(folder, capsys):
    Path("q.jsonl").write_text(json.dumps({"id": 1, "image": "0.png", "question": "q"}) + "\n")
    asked = ["infer", "--model", "./model", "--input", "q.jsonl", "--output", "a.jsonl"]
    assert cli([*asked, "--max-new-tokens", "1"]) == 0
    assert cli([*asked, "--system", "Be brief."]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "holds answers with model ./model, adapter None; choose" in said
