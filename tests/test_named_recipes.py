"""Recipes by name: each builds, and `article` is the article's to the digit."""

from importlib import resources

import pytest

from vlmdpo import cli
from vlmdpo.config import named_recipes, recipes
from vlmdpo.models.option_layers import config_of

# As published: its script, TRL's defaults of the time, and the adapter whose parameters it prints.
ARTICLE = {
    "model": "idefics2-8b",
    "dataset": "rlaif-v",
    "dtype": "bfloat16",
    "bf16": True,
    "image_splitting": False,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 32,
    "gradient_checkpointing": True,
    "num_train_epochs": 1.0,
    "max_steps": -1,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.0,
    "optim": "adamw_torch",
    "beta": 0.1,
    "loss_type": "sigmoid",
    "loss_weights": None,
    "label_smoothing": 0.0,
    "lora": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "use_rslora": False,
    "use_dora": False,
    "lora_target_modules": "all-linear",
    "lora_scope": "all",
    "quantization": "none",
    "group_by_image": False,
    "group_by_length": None,
    "logging_steps": 10.0,
    "set": (),
}


def _train(name):
    return config_of(cli.COMMANDS["train"].config, "train", {"recipe": name})


def test_article_has_the_articles_figures():
    built = _train("article")
    assert {name: getattr(built, name) for name in ARTICLE} == ARTICLE


def test_article_trains_as_many_parameters_as_the_article_prints(vlmdpo):
    code, out, err = vlmdpo("train", "--recipe", "article", "--dry-run", "--json")
    assert code == 0, err
    import json

    plan = json.loads(out)
    assert (plan["trainable"], plan["effective_batch"], plan["rows"]) == (55_348_736, 64, 83_132)
    assert plan["steps"] == 1299


def test_mdpo_has_its_authors_figures():
    built = _train("mdpo")
    assert (built.learning_rate, built.lr_scheduler_type, built.warmup_steps) == (
        1e-5,
        "cosine",
        0.1,
    )
    assert (built.lora_r, built.lora_alpha, built.beta, built.num_train_epochs) == (64, 128, 0.1, 3)
    assert (built.per_device_train_batch_size, built.gradient_accumulation_steps) == (4, 8)
    assert built.set == ("weight_decay=0.05", "adam_beta2=0.98")


def test_anchored_is_on_policy_with_an_anchor():
    one, other = _train("on-policy"), _train("anchored")
    differ = {
        name for name, value in recipes.plain(one).items() if recipes.plain(other)[name] != value
    }
    assert differ == {"loss_type", "loss_weights"}


@pytest.mark.parametrize("name", named_recipes.NAMES)
def test_each_section_builds(name):
    sections = recipes.read_recipe(resources.files("vlmdpo.config").joinpath(f"named/{name}.yaml"))
    assert sections
    for section in sections:
        command = section.replace("_", "-")
        assert command in named_recipes.COMMANDS
        config_of(cli.COMMANDS[command].config, command, {"recipe": name})


def test_the_names_are_those_of_the_files():
    files = resources.files("vlmdpo.config").joinpath("named").iterdir()
    found = {file.name.removesuffix(".yaml") for file in files}
    assert found == set(named_recipes.NAMES)


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_recipe_is_an_option_where_one_may_say_something(command, vlmdpo):
    _, out, _ = vlmdpo(command, "--help")
    assert ("--recipe" in out) == (command in named_recipes.COMMANDS)


def test_an_unknown_recipe_on_the_command_line(vlmdpo):
    code, _, err = vlmdpo("train", "--recipe", "on-polcy")
    assert code == 2
    assert "unknown recipe 'on-polcy'. Did you mean 'on-policy'?" in err
