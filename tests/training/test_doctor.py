"""Every check passes on a sound setup, and fails with its cause on the mistake it is meant for."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.engines import pairs, trainer
from vlmdpo.engine.lengths import row_lengths
from vlmdpo.engine.tree_layout import TreeLayout
from vlmdpo.training import doctor

pytestmark = pytest.mark.slow


@pytest.fixture
def sound(tmp_path):
    """A trainer on a tiny LLaVA whose adapter starts at zero, and its rows."""
    rows = pairs(2)
    made = trainer("llava", "shared", rows, tmp_path)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    return made


def findings(made):
    return {check.name: check for check in doctor.check_setup(made, list(made.train_dataset))}


def test_a_sound_setup_passes_everything(sound):
    found = findings(sound)
    assert len(found) == 6
    assert all(check.passed for check in found.values()), found
    assert re.search(
        r"vision [\d,]+, connector [\d,]+, language [\d,]+", found["trainable parameters"].seen
    )


def test_an_adapter_that_does_not_start_at_zero(sound):
    with torch.no_grad():
        for name, parameter in sound.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    check = findings(sound)["loss at step 0 is ln 2"]
    assert check.passed is False
    assert "adapter" in check.cause


def test_pixels_that_have_no_effect(sound):
    with torch.no_grad():
        for name, parameter in sound.model.named_parameters():
            if "multi_modal_projector" in name:
                parameter.zero_()
    check = findings(sound)["another image changes the log-probs"]
    assert check.passed is False
    assert "pixels do not reach" in check.cause


def test_answers_without_an_end(sound):
    lengths = row_lengths(sound.processing_class, sound.train_dataset)
    sound.pair_collator.max_length = max(length.prompt for length in lengths) + 2
    check = findings(sound)["answers end in an end token"]
    assert check.passed is False
    assert "will not learn to stop" in check.cause


def test_image_tokens_that_do_not_match(sound):
    batch = sound.data_collator([dict(sound.train_dataset[0])])
    image = sound.model.get_base_model().config.image_token_id
    batch["tree_ids"] = batch["tree_ids"].clone()
    batch["tree_ids"][0, (batch["tree_ids"][0] == image).nonzero()[0]] = 7
    check = doctor._check_image_tokens(sound, batch)
    assert check.passed is False
    assert "--max-length" in check.cause


def test_an_empty_answer():
    check = doctor._check_no_empty_answer({"completion_mask": torch.tensor([[0, 1, 1], [0, 0, 0]])})
    assert check.passed is False


def test_nothing_to_train(sound):
    for parameter in sound.model.parameters():
        parameter.requires_grad_(False)
    assert doctor._check_trainable(sound.model).passed is False


def test_a_saved_adapter_is_compared_with_the_live_one(sound, tmp_path):
    with torch.no_grad():
        for name, parameter in sound.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    row = dict(sound.train_dataset[0])
    sound.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert doctor.check_saved_adapter(sound, row, tmp_path / "adapter").passed
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(file).items()}, file)
    assert doctor.check_saved_adapter(sound, row, tmp_path / "adapter").passed is False
    assert "saved" not in sound.model.peft_config


def test_saved_weights_are_compared_bitwise(sound):
    live = sound.model.get_base_model()
    assert doctor.check_saved_model(live, live).passed
    other = trainer("llava", "stock", pairs(1), ".").model.get_base_model()
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    assert doctor.check_saved_model(live, other).passed is False


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    from vlmdpo.commands import prepare
    from vlmdpo.config import PrepareConfig

    folder = tmp_path_factory.mktemp("data") / "few"
    prepare.run(PrepareConfig(limit=8, output_dir=folder))
    return folder


def test_the_command_shows_every_check_and_leaves_nothing(few, tmp_path, vlmdpo):
    code, out, err = vlmdpo("train", "--dataset", few, "--doctor", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert [check["passed"] for check in report["checks"]] == [True] * 9
    assert report["engine"] == "shared"
    assert not (tmp_path / "outputs").exists()
    code, out, _ = vlmdpo("train", "--dataset", few, "--doctor")
    assert code == 0
    assert "the saved adapter equals the live one" in out
    assert "All 9 checks passed" in out


def test_a_wrong_shared_forward_is_detected_and_not_used(few, tmp_path, vlmdpo, monkeypatch):
    gather = TreeLayout.rows_to_slots
    monkeypatch.setattr(TreeLayout, "rows_to_slots", lambda *given: gather(*given).flip(-1))
    more = ["--max-steps", "1", "--output-dir", tmp_path / "out", "--json"]
    code, out, err = vlmdpo("train", "--dataset", few, *more)
    assert code == 0, err
    report = json.loads(out)
    assert (report["engine"], report["images_once"]) == ("rows", True)
    assert "differs from stock rows" in report["fallback_reason"]
    assert "no shared prefix" in err


def test_a_recurrent_model_uses_rows_with_images_once(few, tmp_path, monkeypatch):
    from vlmdpo.commands import train
    from vlmdpo.config import TrainConfig
    from vlmdpo.models import load
    from vlmdpo.tiny import random_models

    monkeypatch.setattr(load, "load_processor", lambda *a, **k: random_models.make("qwen3_5")[1])
    monkeypatch.setattr(load, "load_model", lambda *a, **k: random_models.make("qwen3_5")[0])
    report = train.run(
        TrainConfig(dataset=str(few), output_dir=tmp_path / "out", max_steps=1, device="cpu")
    )
    assert (report["engine"], report["images_once"]) == ("rows", True)
    assert "linear_attention" in report["fallback_reason"]
