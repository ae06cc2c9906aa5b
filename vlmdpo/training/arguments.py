"""TRL's and PEFT's own arguments, made from our options; what they refuse is a ConfigError."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from peft import LoraConfig
from transformers.trainer_utils import IntervalStrategy
from trl import DPOConfig

from vlmdpo.config import LoraOptions, TrainConfig, flag_name
from vlmdpo.errors import ConfigError, MissingDependencyError, install_command, nearest
from vlmdpo.models.families import linear_layers
from vlmdpo.models.load import computes_in_bfloat16

if TYPE_CHECKING:
    from vlmdpo.models.protocols import VisionLanguageModel

# Fields that have the same name and meaning in TrainConfig and DPOConfig.
_SAME_FIELDS = (
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
_OUR_FIELDS = {field.name for field in dataclasses.fields(TrainConfig)}


def dpo_config(config: TrainConfig, output_dir: Path, device: torch.device) -> DPOConfig:
    """TRL's arguments for a run.

    Raises ConfigError if TRL refuses them, or `--set` names an unknown field.
    """
    values: dict[str, Any] = {name: getattr(config, name) for name in _SAME_FIELDS}
    losses, weights, _ = config.losses()
    values |= {
        "learning_rate": config.peak_learning_rate,
        "output_dir": str(output_dir),
        "report_to": list(config.trackers()) or "none",
        "loss_type": losses,
        "loss_weights": weights,
        "bf16": computes_in_bfloat16(device) if config.bf16 is None else config.bf16,
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
    """Evaluate on the test split, in batches as large as in training.

    Args:
        steps: optimizer steps between two evaluations, or a share of the run; None for ten times.
    """
    args.eval_strategy = IntervalStrategy.STEPS
    args.eval_steps = 0.1 if steps is None else steps
    args.per_device_eval_batch_size = args.per_device_train_batch_size


def _extra_fields(settings: tuple[str, ...], computed: dict[str, Any]) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(DPOConfig) if field.init}
    """The fields of `--set`. Raises ConfigError for one that is unknown or not theirs to set."""
    extra: dict[str, Any] = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        key = key.strip().replace("-", "_")
        if not separator:
            raise ConfigError(
                f"--set: '{setting}' must be key=value, as in --set max_grad_norm=0.5"
            )
        if key in computed or key in _OUR_FIELDS:
            if key in _OUR_FIELDS:
                raise ConfigError(f"--set: use {flag_name(key)} for '{key}'")
            raise ConfigError(f"--set: '{key}' is determined by vlmdpo's own options")
        if key not in fields:
            raise ConfigError(f"--set: DPOConfig has no field '{key}'.{nearest(key, fields)}")
        extra[key] = _parsed(text)
    return extra


def _parsed(text: str) -> Any:
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):  # plain text, such as a name or a path
        return yaml.safe_load(text) if text.lower() in ("true", "false") else text


def lora_config(options: LoraOptions, model: VisionLanguageModel) -> LoraConfig | None:
    """PEFT's configuration of the adapter, or None for full fine-tuning.

    Raises ConfigError if no layer matches both `--lora-scope` and `--lora-target-modules`.
    """
    if not options.lora:
        return None
    targets: str | list[str] = options.lora_target_modules
    names = [name.strip() for name in options.lora_target_modules.split(",") if name.strip()]
    if targets != "all-linear":
        targets = names
    if options.lora_scope != "all":
        layers = linear_layers(model, options.lora_scope)
        adapted = [
            layer
            for layer in layers
            if targets == "all-linear" or layer.rsplit(".", 1)[-1] in names
        ]
        if not adapted:
            raise ConfigError(
                f"--lora-target-modules: no layer '{', '.join(names)}' within --lora-scope "
                f"{options.lora_scope}"
            )
        targets = adapted
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        bias="none",
    )
