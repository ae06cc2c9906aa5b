"""Files of a model that have another form than their name says; sizes no model has."""

import json
import shutil
from pathlib import Path

import pytest

from vlmdpo.errors import ModelError
from vlmdpo.models import load


@pytest.fixture
def model():
    return Path(shutil.copytree(load.pretrained_source("tiny"), "model"))


def _refused(model):
    with pytest.raises(ModelError) as caught:
        load.load_processor(str(model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"]
)
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 200_000], ids=["empty", "cut", "list", "deep"]
)
def test_a_file_that_holds_no_object_is_named(name, text, model):
    (model / name).write_text(text)
    message = _refused(model)
    assert f"'{name}' " in message or "config.json is missing or names no model_type" in message


def test_a_tokenizer_without_its_model_is_named(model):
    (model / "tokenizer.json").write_text("{}")
    assert "'tokenizer.json' does not hold what" in _refused(model)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("num_hidden_layers", 10**6, "text_config.num_hidden_layers 1,000,000, which no model has"),
        ("num_hidden_layers", 10**12, "text_config.num_hidden_layers 1,000,000,000,000"),
        ("num_hidden_layers", -1, "text_config.num_hidden_layers -1"),
        ("num_attention_heads", 0, "text_config.num_attention_heads 0"),
        ("vocab_size", 10**11, "text_config.vocab_size 100,000,000,000"),
        ("hidden_size", "many", "the config.json of 'model' is not valid"),
    ],
)
def test_a_configuration_has_the_sizes_of_a_model(name, value, says, model):
    config = json.loads((model / "config.json").read_text())
    config["text_config"][name] = value
    (model / "config.json").write_text(json.dumps(config))
    assert says in _refused(model)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (b"{% for x in %}", "it is not valid Jinja"),
        (b"", "ships no chat template"),
        (b"\xff\xfe\x00", "cannot be loaded: 'utf-8' codec"),
    ],
)
def test_a_broken_chat_template_is_one_line(template, says, model):
    (model / "chat_template.jinja").write_bytes(template)
    assert says in _refused(model)


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)
)
MERGES = "a: &a {k0: 1}\n" + "".join(
    f"b{i}: &b{i} {{<<: [{', '.join(['*' + ('a' if not i else f'b{i - 1}')] * 10)}]}}\n"
    for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "stand for too many values"),
        (MERGES, "stand for too many values"),
        ("learning_rate: " + "[" * 5_000, "nested too deeply"),
        ("a: &a [*a]", "nested too deeply"),
        ("seed: " + "[" * 30 + "]" * 30, "nested too deeply"),
        ("# " + "x" * 1_000_001, "1,000,003 characters"),
    ],
    ids=["aliases", "merges", "deep", "cyclic", "nested", "long"],
)
def test_a_recipe_is_bounded(text, says, vlmdpo):
    Path("recipe.yaml").write_text(text)
    code, _, err = vlmdpo("train", "--config", "recipe.yaml")
    assert code == 2, err[-300:]
    assert says in err
    assert len(err) < 500


def test_a_recipe_may_share_values_and_begin_with_a_byte_order_mark(vlmdpo):
    text = "\ufeffseed: &n 7\nlora_r: *n\n"
    Path("recipe.yaml").write_text(text, encoding="utf-8")
    code, out, err = vlmdpo("train", "--dry-run", "--json", "--config", "recipe.yaml")
    assert code == 0, err
    assert "r=7" in json.loads(out)["how"]
