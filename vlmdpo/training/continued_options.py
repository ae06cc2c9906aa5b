"""`train --adapter`: what an adapter to go on from fixes among the options; whether it can be."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version

from vlmdpo.config import TrainConfig, flag_name, recipes
from vlmdpo.errors import ConfigError, MissingDependencyError, ModelError
from vlmdpo.models.adapter_files import CONFIG, check_adapter, read_config
from vlmdpo.models.registry import recipe

# Of PEFT's LoraConfig: field → (our option, what it is where the file does not say).
_FIXED: dict[str, tuple[str, Any]] = {
    "r": ("lora_r", 8),
    "lora_alpha": ("lora_alpha", 8),
    "lora_dropout": ("lora_dropout", 0.0),
    "use_rslora": ("use_rslora", False),
    "use_dora": ("use_dora", False),
}
# The first release in which two adapters can change weights that are no layers (experts').
_PEFT_WITH_TWO = "0.20"


def settle(config: TrainConfig) -> TrainConfig:
    """The options with those that the adapter of `--adapter` fixes: its size and scale, and how
    prompts are rendered, unless options say that.

    Raises:
        ConfigError: an option says otherwise of what the adapter fixes.
        ModelError: no adapter, one of another model, or one that training cannot go on from.
        MissingDependencyError: PEFT is too old for this one.
    """
    if config.adapter is None:
        return config
    from vlmdpo.models.configured import prompt_settings

    check_adapter(config.adapter, config.model, config.revision)
    kept = read_config(config.adapter)
    _check_kind(config.adapter, kept)
    prompts = prompt_settings(config, adapter=config.adapter)
    kwargs = json.dumps(prompts.template_kwargs) if prompts.template_kwargs else None
    return dataclasses.replace(
        config,
        **_fixed_options(config, config.adapter, kept),
        system=prompts.system,
        chat_template_kwargs=kwargs,
    )


def _fixed_options(config: TrainConfig, adapter: Path, kept: dict[str, Any]) -> dict[str, Any]:
    """What the adapter says of options. Raises ConfigError where one says otherwise.

    One with its default value does not: whether it was given cannot be seen.
    """
    default = recipes.build(TrainConfig, recipe(config.model, "train"))
    fixed = {}
    for name, (option, absent) in _FIXED.items():
        value = kept.get(name, absent)
        if not isinstance(value, type(absent) if isinstance(absent, bool) else (int, float)):
            raise ModelError(
                f"--adapter: '{adapter / CONFIG}' is damaged: {name} is {value!r}; get it again"
            )
        usual, given = getattr(default, option), getattr(config, option)
        fixed[option] = value
        if given not in (value, usual):
            raise ConfigError(
                f"{flag_name(option)} {given}: '{adapter}' was made with {value}, with which "
                "training goes on; leave it out"
            )
    return fixed


def _check_kind(adapter: Path, kept: dict[str, Any]) -> None:
    """Raise for an adapter of which no frozen copy can stand beside it as the reference."""
    what = None
    if kept["peft_type"] != "LORA":
        what = f"is of kind {kept['peft_type']}, not LoRA"
    elif kept.get("bias", "none") != "none":
        what = "has trained biases of the model"
    elif kept.get("modules_to_save"):
        what = f"holds whole layers ({', '.join(kept['modules_to_save'])})"
    elif kept.get("trainable_token_indices"):
        what = "holds embeddings of tokens"
    if what is not None:
        raise ModelError(
            f"--adapter: '{adapter}' {what}, from which training cannot go on; merge it with "
            "vlmdpo export --merge, and give the result as --model"
        )
    if kept.get("target_parameters") and Version(version("peft")) < Version(_PEFT_WITH_TWO):
        raise MissingDependencyError(
            f"--adapter: '{adapter}' adapts experts' weights, and PEFT {version('peft')} cannot "
            f"keep a copy of it as the reference; install peft>={_PEFT_WITH_TWO}"
        )
