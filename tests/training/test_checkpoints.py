"""A checkpoint is known by its list: what is damaged is named, and the one before is taken."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.conftest import unfolded
from vlmdpo.commands import train_folder
from vlmdpo.config import TrainConfig
from vlmdpo.data.folder_lock import locked
from vlmdpo.errors import DataError
from vlmdpo.report.metrics import read_lines
from vlmdpo.training import checkpoints

OUT = Path("out")


def _checkpoint(step, *, listed=True):
    folder = OUT / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": torch.ones(200)}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    save_file({"lora_A": torch.ones(200)}, folder / "adapter_model.safetensors")
    if listed:
        checkpoints._write_list(folder)
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors")
DAMAGE = ((Path.unlink, "is missing"), (cut, "is cut off"), (flip, "has changed since"))


@pytest.mark.parametrize("name", [*FILES, "trainer_state.json"])
@pytest.mark.parametrize(("harm", "says"), DAMAGE, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_damaged_is_named(name, harm, says):
    folder = _checkpoint(2)
    assert checkpoints.damage(folder) is None
    harm(folder / name)
    assert f"'{name}' {says}" in checkpoints.damage(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [Path.unlink, cut], ids=["missing", "cut"])
def test_a_checkpoint_of_an_earlier_version_is_looked_at_too(name, harm):
    folder = _checkpoint(2, listed=False)
    assert checkpoints.damage(folder) is None
    harm(folder / name)
    assert checkpoints.damage(folder) is not None


@pytest.mark.parametrize("text", ["", "[]", '{"optimizer.pt": 1}', "[" * 100_000])
def test_a_list_of_another_form(text):
    folder = _checkpoint(2)
    (folder / checkpoints.FILES).write_text(text)
    assert checkpoints.damage(folder) == "'files.json' cannot be read"


def test_the_checkpoint_before_is_taken_and_the_damaged_one_set_aside(capfd):
    for step in (2, 4, 6):
        _checkpoint(step)
    cut(OUT / "checkpoint-4" / "optimizer.pt")
    (OUT / "checkpoint-6" / "rng_state.pth").unlink()
    assert train_folder.checkpoint_to_resume(OUT, 1) == OUT / "checkpoint-2"
    err = capfd.readouterr().err
    assert "checkpoint-6 is damaged: 'rng_state.pth' is missing" in err
    assert "checkpoint-4 is damaged: 'optimizer.pt' is cut off" in err
    assert "resuming from checkpoint-2" in err
    assert len(checkpoints.list_checkpoints(OUT)) == 3, "nothing is changed before it was read"
    train_folder.go_on(OUT, TrainConfig(), OUT / "checkpoint-2")
    assert [path.name for path in checkpoints.list_checkpoints(OUT)] == ["checkpoint-2"]
    assert (OUT / "checkpoint-6.damaged").is_dir()


def test_where_none_is_whole_nothing_starts_over_in_silence():
    cut(_checkpoint(2) / "optimizer.pt")
    with pytest.raises(DataError, match="no checkpoint in 'out' is whole"):
        train_folder.checkpoint_to_resume(OUT, 1)


def test_another_number_of_processes_is_said(capfd):
    _checkpoint(2)
    train_folder.checkpoint_to_resume(OUT, 2)
    err = unfolded(capfd.readouterr().err)
    assert "checkpoint-2 was written by 1 process, and this run has 2" in err


@pytest.mark.parametrize("text", ["{\n", "[1]\n", '{"loss": 1}\n'])
def test_a_damaged_log_is_named(text):
    Path("metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"'metrics\.jsonl' line 1 is damaged"):
        read_lines(Path("metrics.jsonl"), "restore it")


@pytest.mark.parametrize("text", ["- a", "{", "&a [*a]"])
def test_a_damaged_recipe_is_named(text):
    OUT.mkdir()
    (OUT / "recipe.yaml").write_text(text)
    with pytest.raises(DataError, match="the settings that 'out' was started with cannot be read"):
        train_folder.check(OUT, TrainConfig(resume=True))


def test_one_training_at_a_time(vlmdpo):
    with locked(OUT, "training in"):
        code, _, err = vlmdpo("train", "--device", "cpu", "--output-dir", "out", "--max-steps", "1")
        assert code == 3, err
        assert "another vlmdpo is training in 'out'; wait for it" in err
        with locked(Path("other"), "training in"):
            pass
    with locked(OUT, "training in"):
        pass


_FEW = ["train", "--dataset", "data", "--device", "cpu", "--gradient-accumulation-steps", "1"]
_FEW += ["--per-device-train-batch-size", "2", "--output-dir", "out", "--sample-every", "0"]


@pytest.mark.slow
def test_resumed_from_the_checkpoint_before_a_run_ends_the_same(vlmdpo):
    assert vlmdpo("prepare", "--limit", "12", "--output-dir", "data")[0] == 0
    few = [*_FEW, "--save-steps", "2", "--save-total-limit", "3", "--max-steps", "5"]
    assert vlmdpo(*few)[0] == 0
    adapter = (OUT / "adapter_model.safetensors").read_bytes()
    recipe = (OUT / "recipe.yaml").read_text()
    assert not (OUT / "checkpoint-5.damaged").exists()
    for name in ("checkpoint-5/optimizer.pt", "checkpoint-4/trainer_state.json"):
        (OUT / name).unlink()
    code, _, err = vlmdpo(*few, "--resume", "--lora-r", "4")
    assert code == 2, err
    assert "checkpoint-2 does not fit this run's settings" in unfolded(err)
    assert (OUT / "recipe.yaml").read_text() == recipe, "the refused run changed nothing"
    assert not list(OUT.glob("*.damaged"))
    code, _, err = vlmdpo(*few, "--resume", "--json")
    assert code == 0, err
    assert "resuming from checkpoint-2" in err
    assert (OUT / "adapter_model.safetensors").read_bytes() == adapter
    for path in checkpoints.list_checkpoints(OUT):
        assert checkpoints.damage(path) is None
    assert yaml.safe_load(recipe) == yaml.safe_load((OUT / "recipe.yaml").read_text())
