"""A model or adapter that lacks weights, or has others than its configuration says, is refused."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import unfolded
from vlmdpo.errors import ModelError
from vlmdpo.models import load, weight_files, weights

MODEL = Path(load.pretrained_source("tiny"))
ADAPTER = MODEL.parent / "adapter"
WEIGHT = "model.text_model.layers.0.self_attn.q_proj.weight"
ADAPTED = "base_model.model.model.connector.modality_projection.down_proj.lora_A.weight"
CUT = (MODEL / "model.safetensors").read_bytes()[:100_000]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"


def _changed(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _refused(model="tiny", adapter=None):
    with pytest.raises(ModelError) as caught:
        load.load_model(str(model), device="cpu", adapter=adapter)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def model():
    return Path(shutil.copytree(MODEL, "model"))


@pytest.fixture
def adapter():
    return Path(shutil.copytree(ADAPTER, "adapter"))


def rename(tensors):
    tensors["model.extra.weight"] = tensors.pop(WEIGHT)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(WEIGHT), f"lack 1 weight that its config.json promises ({WEIGHT})"),
        (rename, f"lack 1 weight that its config.json promises ({WEIGHT})"),
        (lambda t: t.update({"model.extra.weight": torch.ones(2)}), "(model.extra.weight)"),
        (lambda t: t.update({WEIGHT: torch.ones(3, 4)}), f"{WEIGHT} is 3×4 in the file and"),
        (lambda t: t[WEIGHT][0].fill_(torch.nan), f"NaN or infinity in 1 weight ({WEIGHT})"),
        (lambda t: t[WEIGHT][0].fill_(torch.inf), f"NaN or infinity in 1 weight ({WEIGHT})"),
    ],
    ids=["missing", "renamed", "unexpected", "mismatched", "nan", "infinity"],
)
def test_a_model_needs_just_its_weights(change, says, model):
    _changed(model / "model.safetensors", change)
    assert says in _refused(model)


@pytest.mark.parametrize(
    ("data", "says"),
    [(CUT, "is cut off after 100 kB of"), (b"", "is empty"), (LFS, "git lfs pull")],
    ids=["cut", "empty", "lfs"],
)
def test_a_damaged_file_is_named_with_what_it_is(data, says, model):
    (model / "model.safetensors").write_bytes(data)
    message = _refused(model)
    assert "'model.safetensors' is" in message
    assert says in message


def test_a_pointer_of_git_lfs_is_found_in_any_file(model):
    (model / "tokenizer.json").write_bytes(LFS)
    with pytest.raises(ModelError, match=r"'tokenizer\.json' is a pointer of git LFS"):
        load.load_processor(str(model))


def test_weights_that_classes_leave_out_on_purpose_are_no_fault():
    keys = {name: set() for name in ("missing_keys", "mismatched_keys")}
    left_out = {"mtp.layers.0.mlp.up_proj.weight", "model.vision_tower.vision_model.head.mlp.bias"}
    weights.check_complete({**keys, "unexpected_keys": left_out}, "some/model")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(ADAPTED), "it lacks weights for this one, as base_model.model"),
        (
            lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(2)}),
            "this one has no place for some of its weights, as base_model.model.x.lora_A.weight",
        ),
        (lambda t: t.update({ADAPTED: torch.ones(3, 4)}), "does not fit the model: Error(s) in"),
        (lambda t: t[ADAPTED][0].fill_(torch.nan), "NaN or infinity in 1 weight (base_model.model"),
    ],
    ids=["missing", "unexpected", "mismatched", "nan"],
)
def test_an_adapter_needs_just_its_weights(change, says, adapter):
    _changed(adapter / "adapter_model.safetensors", change)
    assert says in _refused(adapter=adapter)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "adapter_config.json' is damaged: Expecting property name"),
        ("[" * 100_000, "adapter_config.json' is damaged: maximum recursion"),
        ("[]", "names no peft_type"),
        ('{"peft_type": "NOPE"}', "does not fit the model: 'NOPE'"),
        ('{"peft_type": "LORA", "target_modules": 5}', "does not fit the model: 'int' object"),
    ],
)
def test_a_configuration_of_another_form(text, says, adapter):
    (adapter / "adapter_config.json").write_text(text)
    assert says in _refused(adapter=adapter)


@pytest.mark.parametrize(("data", "says"), [(b"", "is empty"), (LFS, "git lfs pull")])
def test_a_damaged_adapter_is_named(data, says, adapter):
    (adapter / "adapter_model.safetensors").write_bytes(data)
    assert says in _refused(adapter=adapter)


def _trained_on(adapter, base):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))


def _commands():
    yield ["infer", "--model", "tiny", "--image", "x.png", "--question", "Is it?"]
    yield ["eval-amber", "--model", "tiny", "--limit", "1"]
    yield ["export", "--merge", "--model", "./model"]
    if importlib.util.find_spec("gradio"):
        yield ["compare", "--model", "tiny"]
    yield ["train", "--model", "tiny"]


@pytest.mark.parametrize("command", [*_commands()], ids=lambda command: command[0])
def test_every_command_refuses_an_adapter_of_another_base(command, vlmdpo, adapter, model):
    from PIL import Image

    Image.new("RGB", (8, 8)).save("x.png")
    _trained_on(adapter, "HuggingFaceM4/idefics2-8b")
    if command[0] == "export":  # weights decide where both are at hand
        _trained_on(adapter, "tiny")
        _changed(model / "model.safetensors", lambda t: t[WEIGHT].add_(1))
    code, _, err = vlmdpo(*command, "--adapter", "adapter")
    assert code == 4, err
    assert "'adapter' was trained on '" in err
    assert "an adapter fits only its own base; add --model" in err


def test_export_does_not_certify_a_base_that_lacks_weights(vlmdpo, adapter, model):
    _trained_on(adapter, "./model")
    _changed(model / "model.safetensors", lambda t: t.pop(WEIGHT))
    code, _, err = vlmdpo("export", "--adapter", "adapter", "--merge")
    assert code == 4, err
    assert "lack 1 weight" in err
    assert not Path("adapter-merged").exists()


def test_a_copy_of_the_base_is_the_base_in_any_type(adapter, model, capfd):
    load.load_model("./model", device="cpu", adapter=adapter)
    _changed(
        model / "model.safetensors",
        lambda tensors: tensors.update({name: t.float() for name, t in tensors.items()}),
    )
    load.load_model(str(model.absolute()), device="cpu", adapter=adapter)
    assert capfd.readouterr().err == ""
    assert weight_files.same_weights(model, MODEL)


def test_a_base_that_moved_is_believed_with_a_warning(adapter, model, capfd):
    _trained_on(adapter, "/gone/sft")
    load.load_model("./model", device="cpu", adapter=adapter)
    err = unfolded(capfd.readouterr().err)
    assert "was trained on '/gone/sft', which is not here to be compared; './model' is" in err
    assert "was trained on '/gone/sft', and --model is 'tiny'" in _refused(adapter=adapter)
