"""The public API: what `vlmdpo` exports, lazily, with types and documentation."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import vlmdpo
from vlmdpo import errors, ui
from vlmdpo.engine.generate import answer as answer_in_batch
from vlmdpo.models.load import load_adapter, load_model, load_processor
from vlmdpo.tiny import evaluation

ADAPTER = Path(vlmdpo.__file__).parent / "tiny" / "assets" / "adapter"
QUESTIONS = ["Is there a moon in this image?", "Is there a star in this image?"]


@pytest.fixture(scope="module")
def image():
    return evaluation.draw_image(evaluation.first_image_name())


@pytest.fixture(scope="module")
def tuned():
    return vlmdpo.Asker("tiny", adapter=ADAPTER, device="cpu", dtype="float32")


def test_nothing_heavy_is_imported():
    code = (
        "import sys, vlmdpo;"
        "vlmdpo.VlmDpoError, vlmdpo.PrepareConfig, vlmdpo.prepare, vlmdpo.Asker;"
        "print(sorted({'torch', 'transformers', 'trl', 'datasets', 'rich'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() in ("[]", "['rich']")
    code = "import sys, vlmdpo; print(len([m for m in sys.modules if m.startswith('vlmdpo')]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "1"


def test_everything_exported_is_there_and_documented():
    page = (Path(vlmdpo.__file__).parent.parent / "docs" / "library.md").read_text("utf-8")
    for name in vlmdpo.__all__:
        value = getattr(vlmdpo, name)
        assert value.__doc__, name
        assert not value.__doc__.startswith(f"{name}("), f"{name} has dataclass's own docstring"
        assert re.search(rf"\b{name}\b", page), f"docs/library.md does not name {name}"
    assert set(vlmdpo.__all__) <= set(dir(vlmdpo))
    assert sorted(vlmdpo.__all__) == vlmdpo.__all__


def test_every_error_of_the_user_is_exported():
    kinds = {
        kind.__name__
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.VlmDpoError)
    }
    assert kinds - set(vlmdpo.__all__) == {"PeerLost"}, "of launched processes only"


def test_what_there_is_not():
    with pytest.raises(AttributeError, match="module 'vlmdpo' has no attribute 'Pairtrainer'"):
        vlmdpo.Pairtrainer  # noqa: B018


def test_prepare_returns_the_report(tmp_path, capfd):
    options = {"limit": 12, "num_proc": 1, "output_dir": str(tmp_path / "data"), "report": False}
    report = vlmdpo.prepare(**options, quiet=True)
    assert report["path"] == str(tmp_path / "data")
    assert report["rows_out"] + sum(report["dropped"].values()) == report["rows_in"] == 12
    assert report["distinct"]["pairs_per_prompt"] == 1
    assert not report["reused"]
    assert capfd.readouterr().out == ""
    again = vlmdpo.prepare(
        vlmdpo.PrepareConfig(
            limit=12, num_proc=1, output_dir=tmp_path / "data", report=False, quiet=True
        )
    )
    assert again["reused"]


def test_nothing_is_asked(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").touch()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin.readline", lambda: pytest.fail("asked"), raising=False)
    with pytest.raises(vlmdpo.DataError):
        vlmdpo.prepare(limit=2, num_proc=1, output_dir=tmp_path / "data", quiet=True)
    with ui.unattended(quiet=True, yes=False):
        assert ui.is_silent()
        assert not ui.confirm("Replace it?")
    with ui.unattended(quiet=False, yes=True):
        assert ui.confirm("Replace it?")


def test_estimate_returns_the_report(capfd):
    report = vlmdpo.estimate(model="llava-1.5-7b", lora=True, fast=True, gpu="a100-80gb")
    assert report["model"] == "llava-1.5-7b"
    assert report["verdict"]
    assert report["total_bytes"] == sum(part["bytes"] for part in report["components"])
    assert capfd.readouterr().out == ""


def test_evaluate_returns_the_report(tmp_path, capfd):
    options = {"limit": 4, "task": "discriminative", "verify": 0, "device": "cpu"}
    report = vlmdpo.evaluate(**options, output_dir=tmp_path / "amber", quiet=True)
    assert set(report["scores"]["base"]["Discriminative"]) >= {"accuracy", "f1"}
    assert 0 < report["coverage"] <= 1
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vlmdpo.prepare(limt=3), "unknown key 'limt'. Did you mean 'limit'?"),
        (lambda: vlmdpo.prepare(vlmdpo.PrepareConfig(), limit=3), "not both"),
        (lambda: vlmdpo.estimate(json=True), "json: the report is what this function returns"),
        (lambda: vlmdpo.estimate(lora_r=0), "--lora-r: 0 is out of range"),
        (lambda: vlmdpo.evaluate(num_processes=2), "num_processes: a function runs in"),
        (lambda: vlmdpo.Asker("tiny", temperature=1), "temperature: not an option of Asker"),
        (lambda: vlmdpo.Asker("tiny", processor=object()), "processor: only of a loaded model"),
        (lambda: vlmdpo.Asker(object()), "with processor="),
    ],
)
def test_wrong_options(call, message):
    with pytest.raises(vlmdpo.ConfigError, match=re.escape(message)):
        call()


def test_memory_that_runs_out(monkeypatch):
    def full(config):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("vlmdpo.commands.estimate_memory.run", full)
    with pytest.raises(vlmdpo.MemoryBudgetError, match="Tried to allocate 2"):
        vlmdpo.estimate(fast=True)


def test_an_asker_gives_the_answers_of_infer(tuned, image):
    model = load_model("tiny", device="cpu", dtype="float32")
    processor = load_processor("tiny")
    pictures = [image] * len(QUESTIONS)
    base = answer_in_batch(model, processor, pictures, QUESTIONS, 8)
    with_adapter = answer_in_batch(load_adapter(model, ADAPTER), processor, pictures, QUESTIONS, 8)
    assert base != with_adapter
    assert tuned.ask(image, QUESTIONS, max_new_tokens=8) == with_adapter
    assert tuned.ask(image, QUESTIONS, max_new_tokens=8, tuned=False) == base
    assert tuned.ask(image, QUESTIONS[0], max_new_tokens=8) == with_adapter[0]
    assert tuned.ask(image, []) == []


def test_a_loaded_model_and_a_file(tuned, image, tmp_path):
    image.save(tmp_path / "scene.png")
    options = {"processor": tuned.processor, "max_new_tokens": 8}
    found = vlmdpo.answer(tuned.model, tmp_path / "scene.png", QUESTIONS, **options)
    assert found == tuned.ask(image, QUESTIONS, max_new_tokens=8)
    assert found == vlmdpo.answer(tuned.model, image.convert("RGBA"), QUESTIONS, **options)


def test_samples_are_of_their_seed(tuned, image):
    import torch

    state = torch.get_rng_state()
    drawn = [
        tuned.sample(
            image, ["Describe this image."], num_return_sequences=3, seed=seed, max_new_tokens=12
        )
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 1
    assert len(drawn[0][0]) == 3
    assert torch.equal(torch.get_rng_state(), state)
    options = {"num_return_sequences": 3, "seed": 1, "max_new_tokens": 12}
    with_others = tuned.sample(image, [*QUESTIONS, "Describe this image."], **options)
    assert with_others[-1:] == drawn[0], "whatever is asked beside it"
    assert tuned.sample(image, [], num_return_sequences=1) == []
    with pytest.raises(vlmdpo.ConfigError, match="ask gives greedy answers"):
        tuned.sample(image, QUESTIONS, num_return_sequences=1, temperature=0)


def test_what_cannot_be_asked(tuned, tmp_path):
    picture = Image.new("RGB", (36, 36))
    with pytest.raises(vlmdpo.DataError, match="this question cannot be asked"):
        tuned.ask(picture, "What are <image> and <image>?")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(vlmdpo.DataError, match=r"broken\.png"):
        tuned.ask(tmp_path / "broken.png", QUESTIONS)
    with pytest.raises(vlmdpo.ModelError):
        vlmdpo.Asker(str(tmp_path / "nothing"))
