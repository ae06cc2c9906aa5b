"""Data prepared for another model is refused, with what it lost, or taken with a flag."""

import json
import shutil
from pathlib import Path

import pytest

from vlmdpo.config import TrainConfig
from vlmdpo.data import store
from vlmdpo.errors import DataError
from vlmdpo.models import load
from vlmdpo.tiny import random_models
from vlmdpo.training.data_check import check_prepared_for

TINY = {"model": "tiny", "max_image_side": 72, "processor_class": "Idefics2Processor"}


@pytest.fixture(scope="module")
def llava():
    """A processor of another family, which takes images of up to 96 pixels."""
    from vlmdpo.models.chat_template import PromptSettings, add_missing_template
    from vlmdpo.models.rendering import set_rendering

    processor = random_models.make("llava", image_size=48)[1]
    add_missing_template(processor)
    set_rendering(processor, PromptSettings(), "./llava")
    return processor


def _check(manifest, processor, **settings):
    config = TrainConfig(**{"model": "./llava", "dataset": "data", **settings})
    check_prepared_for(Path("data"), manifest, processor, config)


def test_another_family_and_its_smaller_images_are_refused(llava):
    with pytest.raises(DataError) as caught:
        _check(TINY, llava)
    message = str(caught.value)
    assert "'data' was prepared for 'tiny': another family (Idefics2Processor; './llava'" in message
    assert "images were reduced to 72 pixels per side, where this one takes up to 96" in message
    assert "Prepare it again with --model ./llava, or go on with --data-of-another" in message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"processor_class": "LlavaProcessor"}, "images were reduced to 72 pixels"),
        ({"max_image_side": 96}, "another family"),
        ({"max_image_side": None}, "another family"),
        (
            {"processor_class": "LlavaProcessor", "max_image_side": 96, "max_length": 50},
            "rows over --max-length 50 were dropped or trimmed by its tokens",
        ),
    ],
)
def test_each_loss_is_named(change, says, llava):
    with pytest.raises(DataError, match=says) as caught:
        _check({**TINY, **change}, llava)
    assert ";" not in str(caught.value).replace("; './llava' has", "")


def test_with_the_flag_it_is_a_warning(llava, capfd):
    _check(TINY, llava, data_of_another_model=True)
    err = " ".join(capfd.readouterr().err.split())
    assert "warning: --data-of-another-model: 'data' was prepared for 'tiny'" in err
    assert "Tokens are counted anew" in err


def test_nothing_lost_is_nothing_said(llava, capfd):
    enough = {"model": "./other", "max_image_side": 96, "processor_class": "LlavaProcessor"}
    _check(enough, llava)
    _check({**TINY, "model": "./llava"}, llava)  # whoever bounds images for a model means it
    assert capfd.readouterr().err == ""


def test_data_prepared_for_a_model_trains_it_under_another_name_too(vlmdpo):
    assert vlmdpo("prepare", "--limit", "8", "--output-dir", "data")[0] == 0
    shutil.copytree(load.pretrained_source("tiny"), "copy")
    manifest = store.read_manifest(Path("data"))
    for model in ("tiny", "./copy"):
        _check(manifest, load.load_processor(model), model=model, dataset="data")
    manifest["model"] = "./gone"
    _check(manifest, load.load_processor("tiny"), model="tiny", dataset="data")


def test_a_plan_refuses_it_too_and_takes_no_counts(vlmdpo):
    assert vlmdpo("prepare", "--limit", "8", "--output-dir", "data")[0] == 0
    arguments = ["train", "--dry-run", "--model", "idefics2-8b", "--dataset", "data"]
    code, _, err = vlmdpo(*arguments)
    assert code == 3
    assert "images were reduced to 72 pixels per side, where this one takes up to 490" in err
    code, out, err = vlmdpo(*arguments, "--data-of-another-model", "--json")
    assert code == 0, err
    assert "--dataset data" not in json.loads(out)["estimate"]
    code, _, err = vlmdpo(
        *("estimate-memory", "--fast", "--model", "idefics2-8b", "--dataset", "data")
    )
    assert code == 3
    assert "the tokens of 'data' were counted for 'tiny', not 'idefics2-8b'" in err


@pytest.mark.slow
def test_train_compares_them(vlmdpo):
    model, processor = random_models.make("llava", image_size=48)
    model.save_pretrained("llava")
    processor.save_pretrained("llava")
    assert vlmdpo("prepare", "--limit", "8", "--output-dir", "data")[0] == 0
    arguments = ["train", "--model", "./llava", "--dataset", "data", "--max-steps", "1"]
    arguments += ["--gradient-accumulation-steps", "1", "--output-dir", "out"]
    code, _, err = vlmdpo(*arguments)
    assert code == 3, err
    assert "'data' was prepared for 'tiny': another family" in err
    assert not Path("out").exists()
    code, _, err = vlmdpo(*arguments, "--data-of-another-model")
    assert code == 0, err
