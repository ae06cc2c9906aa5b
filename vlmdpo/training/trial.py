"""TRL's construction, tried on the embedded model: what it refuses is known before anything loads.

TRL checks many settings only when a trainer is made, which is after the model was loaded.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmdpo.config import TrainConfig, set_key
from vlmdpo.distributed.processes import launched_strategy
from vlmdpo.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset


# Fields that depend on the model or the device: the embedded model on a CPU says nothing of them.
_OF_THE_RUN = ("router_aux_loss_coef", "activation_offloading", "fp16", "tf32")
# Fields that need a GPU → what transformers or TRL make of them on a CPU.
_OF_A_GPU = {
    "activation_offloading": "offloads to the CPU, which this run is on",
    "fp16": "has no effect on a CPU, which this run is on; leave it out, or use --bf16",
    "tf32": "has no effect on a CPU, which this run is on; leave it out",
}


def try_if_unusual(config: TrainConfig, device: torch.device) -> None:
    """`try_settings` for a run with settings of TRL's own, in the one process that it has."""
    for setting in config.set if device.type == "cpu" else ():
        key, value = set_key(setting), setting.partition("=")[2].strip().lower()
        if key in _OF_A_GPU and value not in ("false", "none", "null"):
            raise ConfigError(f"--set {key}: {_OF_A_GPU[key]}")
    if (config.set or config.optim != "auto") and not launched_strategy():
        try_settings(config, device)


def try_settings(config: TrainConfig, device: torch.device) -> None:
    """Make trainer, optimizer and schedule as the run would, of the smallest model there is, and
    compute a loss.

    Args:
        device: the run's, because accelerate keeps it for the whole process.

    Raises ConfigError for what TRL or transformers refuse, MissingDependencyError for a package.
    """
    from peft import LoraConfig

    from vlmdpo.models.load import load_model, load_processor
    from vlmdpo.training.arguments import dpo_config, enable_evaluation, translate_refusals
    from vlmdpo.training.make_trainer import make_trainer

    kept = [text for text in config.set if set_key(text) not in _OF_THE_RUN]
    # As `--doctor` it says nothing of GPUs.
    own: dict[str, Any] = {"report_to": "none", "doctor": True, "set": tuple(kept)}
    with tempfile.TemporaryDirectory() as folder, translate_refusals(config):
        args = dpo_config(dataclasses.replace(config, **own), Path(folder), device)
        rows = _rows()
        enable_evaluation(args, config.eval_steps)
        trainer = make_trainer(
            engine="stock" if config.engine == "stock" else "shared",
            model=load_model("tiny", device=str(device), dtype="float32"),
            reference_model=None if config.lora else load_model("tiny", device=str(device)),
            processor=load_processor("tiny"),
            train_dataset=rows,
            eval_dataset=rows,
            args=args,
            lora_config=LoraConfig(r=1, target_modules=["q_proj"]) if config.lora else None,
            mdpo=config.losses().is_mdpo,
        )
        trainer.create_optimizer_and_scheduler(num_training_steps=2)
        batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
        trainer.compute_loss(trainer.model, batch)


def _rows() -> Dataset:
    from datasets import Dataset
    from PIL import Image

    from vlmdpo.data.pairs import message
    from vlmdpo.data.store import pair_features

    row = {
        "images": [Image.new("RGB", (36, 36))],
        "prompt": [message("user", "Is it?", 1)],
        "chosen": [message("assistant", "Yes.")],
        "rejected": [message("assistant", "No.")],
    }
    rows = Dataset.from_list([row] * 2, features=pair_features())
    return rows.add_column("row", range(len(rows)))
