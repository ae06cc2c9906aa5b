"""The folder of an adapter: is it one, is it whole, and which base model was it trained on?"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.errors import ModelError
from vlmdpo.models import registry
from vlmdpo.models.weight_files import damage, local_folder, same_weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_adapter(adapter: Path, model: str, revision: str | None = None) -> None:
    """Raise ModelError unless a folder holds a PEFT adapter in safetensors, trained on this model.

    Args:
        model, revision: as `--model` and `--revision` name them.
    """
    named = read_config(adapter).get("base_model_name_or_path")
    reason = damage(adapter / WEIGHTS)
    if reason is not None:
        raise ModelError(f"--adapter: '{adapter / WEIGHTS}' {reason}")
    if isinstance(named, str) and named:
        _check_base(adapter, named, model, revision)


def read_config(adapter: Path) -> dict[str, Any]:
    """PEFT's configuration of an adapter. Raises ModelError if the folder holds no adapter."""
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            raise ModelError(
                f"--adapter: '{adapter}' holds no {name}; give the output folder of vlmdpo train"
            )
    try:
        config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise ModelError(
            f"--adapter: '{adapter / CONFIG}' is damaged: {problem}; get it again"
        ) from problem
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ModelError(
            f"--adapter: '{adapter / CONFIG}' is not a configuration of PEFT: it names no peft_type"
        )
    return config


def base_of_adapter(adapter: Path) -> str:
    """The base model that an adapter names. Raises ModelError if the folder holds no adapter."""
    named = read_config(adapter).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ModelError(f"--adapter: '{adapter}' names no base model; give it with --model")
    return named


def base_layer(given: Mapping[str, Any]) -> dict[str, str]:
    """The option `model` of a call that gives an adapter and no model: the base that it names.

    Args:
        given: options by field name, from a recipe, flags or keyword arguments.

    Returns nothing for other calls. Raises ModelError if the folder holds no adapter, or one whose
    base was a folder that is not here.
    """
    adapter = given.get("adapter")
    if given.get("model") is not None or not isinstance(adapter, (str, Path)):
        return {}
    named = base_of_adapter(Path(adapter))
    if registry.is_same_name(named, str(local_folder("tiny"))):  # as PEFT alone names it
        return {"model": "tiny"}
    if named.startswith((".", "/", "~")) and not Path(named).expanduser().is_dir():
        raise ModelError(
            f"--adapter: '{adapter}' was trained on '{named}', which is not here; say where the "
            "model is with --model"
        )
    return {"model": named}


def _check_base(adapter: Path, named: str, model: str, revision: str | None) -> None:
    """Raise ModelError for an adapter that was trained on another model than `model`.

    A model may have moved, or be a copy: where both are at hand, their weights decide. Where the
    base is not, a path is believed with a warning, because paths differ between machines.
    """
    if registry.is_same_name(named, model):
        return
    base, given = local_folder(named), local_folder(model, revision)
    same = same_weights(base, given) if base is not None and given is not None else None
    if same:
        return
    if same is False or model == "tiny" or (_is_hub_id(named) and _is_hub_id(model)):
        raise ModelError(
            f"--adapter: '{adapter}' was trained on '{named}', and --model is '{model}': an "
            f"adapter fits only its own base; add --model {shlex.quote(named)}"
        )
    if Path(named).name != Path(model).name:
        ui.warn(
            f"--adapter: '{adapter}' was trained on '{named}', which is not here to be compared; "
            f"'{model}' is taken for the same model"
        )


def _is_hub_id(model: str) -> bool:
    """Whether a name is an alias or a Hub id rather than a path, which differs between machines."""
    looks_like_one = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    return not Path(model).is_dir() and (looks_like_one or registry.find(model) is not None)
