"""A command's options from their layers: what a model, a named recipe, a file and flags say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from vlmdpo.config import recipes
from vlmdpo.config.named_recipes import named_recipe
from vlmdpo.errors import ConfigError, ModelError
from vlmdpo.models import registry
from vlmdpo.models.adapter_files import base_layer

Config = TypeVar("Config")
# Options of an adapter that training goes on from, which a recipe for a new one cannot choose.
_OF_THE_ADAPTER = {
    *("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"),
    *("lora_target_modules", "lora_scope"),
}


def config_of(cls: type[Config], command: str, *layers: Mapping[str, Any]) -> Config:
    """A command's config: its defaults, the model's own recipe, the recipe that `recipe` names in
    one of the layers, and the layers themselves, later ones winning. Without `model`, it is the
    base that `adapter` names.

    Raises ConfigError for an unknown key, recipe, or value of the wrong type; ModelError for an
    adapter that is none.
    """
    given = {key: value for layer in layers for key, value in layer.items()}
    name = given.pop("recipe", None)
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"--recipe: give the name of a recipe, not {name!r}")
    named = named_recipe(name, command) if name is not None else {}
    if given.get("adapter") is not None:
        named = {key: value for key, value in named.items() if key not in _OF_THE_ADAPTER}
    given = {**named, **given}
    said = [{key: value for key, value in one.items() if key != "recipe"} for one in layers]
    try:
        base = base_layer(given) if "adapter" in recipes.field_types(cls) else {}
    except ModelError:
        recipes.build(cls, named, *said)  # options that cannot be are said first
        raise
    model = str(given.get("model") or base.get("model") or "tiny")
    return recipes.build(cls, registry.recipe(model, command), base, named, *said)
