"""TRL's and PEFT's own arguments, made from a `TrainConfig`; what they refuse becomes one clear
line.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig
from transformers.trainer_utils import IntervalStrategy
from trl import DPOConfig

from vlmdpo.config import TrainConfig, flag_name
from vlmdpo.errors import ConfigError, MissingDependencyError, install_command, nearest
from vlmdpo.models.families import linear_layers

# Fields that have the same name and meaning in TrainConfig and DPOConfig.
_SHARED = (
    *(
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "max_steps",
    ),
    *(
        "lr_scheduler_type",
        "warmup_steps",
        "beta",
        "max_length",
        "gradient_checkpointing",
        "optim",
        "logging_steps",
    ),
    *("label_smoothing", "save_steps", "save_total_limit", "dataloader_num_workers", "seed"),
)
_OWN = {field.name for field in dataclasses.fields(TrainConfig)}


def dpo_config(config: TrainConfig, output_dir: Path, device: torch.device) -> DPOConfig:
    """TRL's arguments for a run. Raises ConfigError where TRL refuses them or `--set` names no
    field of theirs.
    """
    gpu_has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    values: dict[str, Any] = {name: getattr(config, name) for name in _SHARED}
    losses, weights, _ = config.losses()
    values |= {
        "learning_rate": config.peak_learning_rate,
        "output_dir": str(output_dir),
        "report_to": list(config.trackers()) or "none",
        "loss_type": losses,
        "loss_weights": weights,
        "bf16": gpu_has_bf16 if config.bf16 is None else config.bf16,
        "use_cpu": device.type == "cpu",
        "disable_tqdm": True,
        "logging_first_step": True,
        "dataloader_pin_memory": device.type == "cuda",
    }
    values |= _extra_fields(config.set, values)
    for name in config.trackers():
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(
                f"--report-to {name} needs a package: {install_command(name)}"
            )
    try:
        return DPOConfig(**values)
    except (ValueError, TypeError, ImportError) as problem:
        raise ConfigError(
            f"TRL refuses these settings: {' '.join(str(problem).split())}"
        ) from problem


def enable_evaluation(args: DPOConfig, steps: float | None) -> None:
    """Let a run evaluate on its test split: so often, or ten times; in batches of as many pairs as
    it trains in.
    """
    args.eval_strategy = IntervalStrategy.STEPS
    args.eval_steps = 0.1 if steps is None else steps
    args.per_device_eval_batch_size = args.per_device_train_batch_size


def _extra_fields(settings: tuple[str, ...], ours: dict[str, Any]) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(DPOConfig) if field.init}
    found: dict[str, Any] = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        key = key.strip().replace("-", "_")
        if not separator:
            raise ConfigError(
                f"--set: '{setting}' must be key=value, as in --set max_grad_norm=0.5"
            )
        if key in ours or key in _OWN:
            where = (
                flag_name(key)
                if key in _OWN
                else "an option of vlmdpo's own, or vlmdpo itself, for it"
            )
            raise ConfigError(f"--set: '{key}' is not set here; use {where}")
        if key not in fields:
            raise ConfigError(f"--set: DPOConfig has no field '{key}'.{nearest(key, fields)}")
        found[key] = _value(text)
    return found


def _value(text: str) -> Any:
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):  # plain text then: a name, a path
        return yaml.safe_load(text) if text.lower() in ("true", "false") else text


def lora_config(config: TrainConfig, model: Any) -> LoraConfig | None:
    """PEFT's configuration of the adapter, or None for full fine-tuning.

    Raises ConfigError where `--lora-scope` and `--lora-target-modules` leave no layer.
    """
    if not config.lora:
        return None
    targets: str | list[str] = config.lora_target_modules
    names = [name.strip() for name in config.lora_target_modules.split(",") if name.strip()]
    if targets != "all-linear":
        targets = names
    if config.lora_scope != "all":
        within = linear_layers(model, config.lora_scope)
        wanted = [
            layer
            for layer in within
            if targets == "all-linear" or layer.rsplit(".", 1)[-1] in names
        ]
        if not wanted:
            raise ConfigError(
                f"--lora-target-modules: no layer '{', '.join(names)}' in --lora-scope "
                f"{config.lora_scope}"
            )
        targets = wanted
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        bias="none",
    )
