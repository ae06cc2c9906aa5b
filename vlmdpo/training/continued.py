"""`train --adapter`: the adapter trains on in place, and a frozen copy of it is the reference.

TRL makes the copy, as it does for any PEFT model that it is given. The result is one adapter of the
same rank, which holds all rounds.
"""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from vlmdpo.config import LoraOptions
from vlmdpo.errors import ConfigError, ModelError
from vlmdpo.models.adapters import REFERENCE
from vlmdpo.models.families import linear_layers, unwrap_peft
from vlmdpo.models.load import load_adapter
from vlmdpo.models.protocols import AdaptedModel, VisionLanguageModel


def with_adapter(options: LoraOptions, adapter: Path, model: VisionLanguageModel) -> AdaptedModel:
    """The model with the adapter, ready to train on.

    Raises ModelError if it does not fit, ConfigError if it has other layers than options say.
    """
    in_scope = set(linear_layers(model, options.lora_scope))
    adapted = load_adapter(model, adapter, is_trainable=True)
    layers = [
        name
        for name, module in unwrap_peft(adapted).named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
    outside = [name for name in layers if name not in in_scope]
    if options.lora_scope != "all" and outside:
        raise ConfigError(
            f"--lora-scope {options.lora_scope}: '{adapter}' also has '{outside[0]}', on which "
            "training goes on; leave it out"
        )
    _check_targets(options.lora_target_modules, adapter, layers)
    return adapted


def _check_targets(targets: str, adapter: Path, layers: list[str]) -> None:
    """Raise ConfigError unless `--lora-target-modules` names the adapter's layers, or all."""
    names = [name.strip() for name in targets.split(",") if name.strip()]
    if names == ["all-linear"]:
        return

    def is_named(layer: str, name: str) -> bool:
        return f".{layer}".endswith(f".{name}")

    absent = [name for name in names if not any(is_named(layer, name) for layer in layers)]
    more = [layer for layer in layers if not any(is_named(layer, name) for name in names)]
    if absent or more:
        what = f"has no '{absent[0]}'" if absent else f"also has '{more[0]}'"
        raise ConfigError(
            f"--lora-target-modules {targets}: '{adapter}' {what}, and its layers stay; leave it "
            "out"
        )


def settle_reference(model: PeftModel) -> None:
    """Make the copy exactly the adapter that trains, frozen and without dropout.

    Raises ModelError if TRL has made none.
    """
    if REFERENCE not in model.peft_config:
        raise ModelError("--adapter: TRL made no copy of this adapter to be the reference")
    for module in model.modules():
        dropout = getattr(module, "lora_dropout", None)
        if isinstance(module, BaseTunerLayer) and dropout is not None and REFERENCE in dropout:
            dropout[REFERENCE] = nn.Identity()
    for name, parameter in model.named_parameters():
        if f".{REFERENCE}." in name:
            assert not parameter.requires_grad, f"{name} would train"
            # In 4-bit models TRL has rounded the one that trains to bfloat16, after it was copied.
            trained = model.get_parameter(name.replace(f".{REFERENCE}.", ".default."))
            trained.data.copy_(parameter.data)
