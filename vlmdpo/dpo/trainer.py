"""DPO training itself: TRL's `DPOTrainer`, told what vlmdpo knows, watched by one callback.

Loss, metrics and logging are TRL's own. This module adds what a person needs around them: live progress, a
metrics file, and a stop that keeps a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from vlmdpo import ui
from vlmdpo.config import TrainConfig, flag_name
from vlmdpo.errors import ConfigError, nearest

METRICS = "metrics.jsonl"
# Fields that have the same name and meaning in TrainConfig and DPOConfig.
_SHARED = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "learning_rate"),
    *("lr_scheduler_type", "warmup_steps", "beta", "max_length", "gradient_checkpointing", "optim", "logging_steps"),
    *("save_steps", "save_total_limit", "dataloader_num_workers", "report_to", "seed"),
)


def dpo_config(config: TrainConfig, output_dir: Path, device: torch.device) -> DPOConfig:
    """TRL's arguments for a run. Raises ConfigError where TRL refuses them or `--set` names no field of theirs."""
    gpu_has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    values: dict[str, Any] = {name: getattr(config, name) for name in _SHARED}
    values |= {
        "output_dir": str(output_dir),
        "loss_type": [config.loss_type],
        "bf16": gpu_has_bf16 if config.bf16 is None else config.bf16,
        "use_cpu": device.type == "cpu",
        "disable_tqdm": True,
        "logging_first_step": True,
        "dataloader_pin_memory": device.type == "cuda",
    }
    values |= _extra_fields(config.set, values)
    try:
        return DPOConfig(**values)
    except (ValueError, TypeError, ImportError) as problem:
        raise ConfigError(f"TRL refuses these settings: {' '.join(str(problem).split())}") from problem


def _extra_fields(settings: tuple[str, ...], ours: dict[str, Any]) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(DPOConfig) if field.init}
    found: dict[str, Any] = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        key = key.strip().replace("-", "_")
        if not separator:
            raise ConfigError(f"--set: '{setting}' must be key=value, as in --set max_grad_norm=0.5")
        if key in ours:
            where = flag_name(key) if key in _SHARED else "an option of vlmdpo's own, or vlmdpo itself, for it"
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


def lora_config(config: TrainConfig) -> LoraConfig | None:
    """PEFT's configuration of the adapter, or None for full fine-tuning."""
    if not config.lora:
        return None
    targets: str | list[str] = config.lora_target_modules
    if targets != "all-linear":
        targets = [name.strip() for name in config.lora_target_modules.split(",") if name.strip()]
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        bias="none",
    )


class Watch(TrainerCallback):
    """Shows progress, appends to the metrics file, and turns Ctrl-C into a checkpoint and a clean stop.

    After training, `interrupted` tells whether Ctrl-C ended it and `lines` holds every logged line.
    """

    def __init__(self, metrics_file: Path) -> None:
        self.metrics_file = metrics_file
        self.interrupted = False
        self.lines: list[dict[str, Any]] = []
        self._bar: ui.Bar | None = None
        self._open = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # After a resume, lines past the checkpoint belong to steps that will be done again.
        self.lines = [line for line in _read_lines(self.metrics_file) if line["step"] <= state.global_step]
        self.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        self._bar = self._open.enter_context(ui.progress("train", state.max_steps))
        self._bar.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._bar is not None
        self._bar.advance()
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" not in logs:  # the summary at the end, which `train` returns anyway
            return
        line = {"step": state.global_step, **logs}
        self.lines.append(line)
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._bar is not None:
            accuracy, margin = logs.get("rewards/accuracies", 0.0), logs.get("rewards/margins", 0.0)
            self._bar.advance(0, f"loss {logs['loss']:.3f} acc {accuracy:.2f} margin {margin:+.2f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._open.close()

    @contextlib.contextmanager
    def catching_ctrl_c(self) -> Iterator[None]:
        """The first Ctrl-C ends the step and saves; a second one stops at once. The bar closes either way."""

        def stop(signum: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            ui.warn("stopping after this step, keeping a checkpoint; press Ctrl-C again to stop at once")

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            self._open.close()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_trainer(
    model: Any, reference: Any, processor: Any, dataset: Any, args: DPOConfig, lora: LoraConfig | None, watch: Watch
) -> DPOTrainer:
    """TRL's trainer on a prepared dataset, with our progress instead of its bars. Raises ConfigError for bad targets."""
    try:
        trainer = DPOTrainer(
            model=model,
            ref_model=reference,
            args=args,
            train_dataset=dataset,
            processing_class=processor,
            peft_config=lora,
            callbacks=[watch],
        )
    except ValueError as problem:
        if "Target modules" not in str(problem):
            raise
        raise ConfigError(f"--lora-target-modules: {str(problem).splitlines()[0]}") from problem
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer
