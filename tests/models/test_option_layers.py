"""Options in layers: the model's own recipe, a recipe by name, a file, flags; and the model that an
adapter names.
"""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import vlmdpo
from vlmdpo.api import calls
from vlmdpo.config import (
    CompareConfig,
    EvalAmberConfig,
    ExportConfig,
    InferConfig,
    MakePairsConfig,
    TrainConfig,
)
from vlmdpo.errors import ConfigError, ModelError
from vlmdpo.models.option_layers import config_of

SHIPPED = Path(vlmdpo.__file__).parent / "tiny" / "assets" / "adapter"


def _adapter_of(base):
    folder = Path(shutil.copytree(SHIPPED, "adapter"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = base
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("command", "cls"),
    [
        ("train", TrainConfig),
        ("infer", InferConfig),
        ("eval-amber", EvalAmberConfig),
        ("compare", CompareConfig),
        ("make-pairs", MakePairsConfig),
        ("export", ExportConfig),
    ],
)
def test_without_a_model_it_is_the_one_that_the_adapter_names(command, cls):
    given = {"adapter": str(_adapter_of("llava-hf/llava-1.5-7b-hf"))}
    given |= {"merge": True} if command == "export" else {}
    assert config_of(cls, command, given).model == "llava-hf/llava-1.5-7b-hf"
    assert config_of(cls, command, given, {"model": "tiny"}).model == "tiny"


def test_the_models_own_recipe_is_that_of_the_adapters_base():
    given = {"adapter": SHIPPED}
    assert config_of(TrainConfig, "train", given).gradient_checkpointing is False
    other = {"adapter": _adapter_of("llava-hf/llava-1.5-7b-hf")}
    assert config_of(TrainConfig, "train", other).gradient_checkpointing is True


def test_every_command_with_an_adapter_takes_its_base(vlmdpo):
    adapter = _adapter_of("nobody/nothing")
    Image.new("RGB", (8, 8)).save("photo.jpg")
    more = {"infer": ["--image", "photo.jpg", "--question", "What is it?"]}
    for command in ("infer", "eval-amber", "train"):
        code, _, err = vlmdpo(command, "--adapter", adapter, *more.get(command, []))
        assert code == 4, (command, err)
        assert "nobody/nothing" in err


def test_from_python_too():
    from vlmdpo.api import asking

    adapter = _adapter_of("nobody/nothing")
    with pytest.raises(ModelError, match="nobody/nothing"):
        asking.Asker(adapter=adapter)
    with pytest.raises(ModelError, match="nobody/nothing"):
        calls.evaluate(adapter=str(adapter))


def test_an_adapter_that_is_none_or_names_nothing():
    with pytest.raises(ModelError, match="holds no adapter_config"):
        config_of(InferConfig, "infer", {"adapter": "nothing"})
    with pytest.raises(ModelError, match="names no base model; give it with --model"):
        config_of(InferConfig, "infer", {"adapter": _adapter_of(None)})


def test_an_adapter_that_names_a_folder():
    from vlmdpo.models.weight_files import local_folder

    built = config_of(InferConfig, "infer", {"adapter": _adapter_of(str(local_folder("tiny")))})
    assert built.model == "tiny", "as PEFT names it, where a script has loaded it"
    shutil.rmtree("adapter")
    with pytest.raises(ModelError, match="was trained on '/old/base', which is not here; say"):
        config_of(InferConfig, "infer", {"adapter": _adapter_of("/old/base")})


def test_options_that_cannot_be_are_said_before_the_adapter_is_read():
    with pytest.raises(ConfigError, match="nothing to do"):
        config_of(ExportConfig, "export", {"adapter": "nothing"})


def test_later_layers_win_over_a_recipe_by_name():
    said = {"recipe": "anchored", "beta": 0.3}
    built = config_of(TrainConfig, "train", said, {"learning_rate": 2e-5})
    assert (built.loss_type, built.lora_r) == ("sigmoid,sft", 64)
    assert (built.beta, built.learning_rate) == (0.3, 2e-5)
    assert config_of(TrainConfig, "train", said, {"recipe": "mdpo"}).loss_type == "mdpo"


def test_with_an_adapter_a_recipe_does_not_say_its_size():
    built = config_of(TrainConfig, "train", {"recipe": "anchored", "adapter": SHIPPED})
    assert (built.loss_type, built.lora_r) == ("sigmoid,sft", 16)


@pytest.mark.parametrize(
    ("command", "cls", "recipe", "says"),
    [
        ("train", TrainConfig, "artcile", "unknown recipe 'artcile'. Did you mean 'article'?"),
        ("train", TrainConfig, 3, "give the name of a recipe, not 3"),
        ("infer", InferConfig, "mdpo", "--recipe mdpo says nothing of infer, only of train"),
    ],
)
def test_a_recipe_that_is_none(command, cls, recipe, says):
    with pytest.raises(ConfigError) as problem:
        config_of(cls, command, {"recipe": recipe})
    assert says in str(problem.value)
