"""A `RunTrainer` with our callbacks in place of TRL's."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from vlmdpo.errors import ConfigError
from vlmdpo.models.families import unwrap_peft
from vlmdpo.training import continued
from vlmdpo.training.run_trainer import RunTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerControl, TrainerState, TrainingArguments
    from trl import DPOConfig

    from vlmdpo.engine.reference_cache import ReferenceCache
    from vlmdpo.models.protocols import Processor, VisionLanguageModel
    from vlmdpo.training.monitor import TrainingMonitor


class _ReferenceCacheSaver(TrainerCallback):
    """Writes reference log-probs at every checkpoint and after every epoch."""

    trainer: RunTrainer  # set once there is one

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.save_reference_cache()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.save_reference_cache()


def make_trainer(
    *,
    engine: str,
    model: VisionLanguageModel,
    reference_model: VisionLanguageModel | None,
    processor: Processor,
    train_dataset: Dataset,
    eval_dataset: Dataset | None = None,
    args: DPOConfig,
    lora_config: LoraConfig | None,
    monitor: TrainingMonitor | None = None,
    reference_cache: ReferenceCache | None = None,
    mdpo: bool = False,
) -> RunTrainer:
    """A `RunTrainer` that reports to `monitor` instead of showing TRL's progress bars.

    Args:
        model: with `lora_config` None, a PEFT model goes on with its adapter, of which the
            reference has a copy.
        eval_dataset: rows to evaluate on, with a column `row`.

    Raises ConfigError if no layer matches the adapter's target modules.
    """
    if "row" not in train_dataset.column_names:
        train_dataset = train_dataset.add_column("row", range(len(train_dataset)))
    saver = _ReferenceCacheSaver()
    if reference_cache is not None and lora_config is None and not isinstance(model, PeftModel):
        # Without an adapter TRL insists on a reference model, which the cache makes unnecessary. A
        # second handle on the same weights, which takes no memory, stands in until `RunTrainer`
        # drops it.
        reference_model = copy.copy(model)
    try:
        trainer = RunTrainer(
            engine=engine,
            reference_cache=reference_cache,
            mdpo=mdpo,
            model=model,
            ref_model=reference_model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            peft_config=lora_config,
            callbacks=[saver] if monitor is None else [saver, monitor],
        )
    except ValueError as problem:
        if "does not work with lora_dropout" in str(problem):  # PEFT's words
            raise ConfigError(
                "--lora-dropout: PEFT adapts this model's experts as weights, where it cannot use "
                "dropout; add --lora-dropout 0"
            ) from problem
        if "Target modules" not in str(problem):  # likewise
            raise
        raise ConfigError(f"--lora-target-modules: {str(problem).splitlines()[0]}") from problem
    saver.trainer = trainer
    _keep_adapters_in_float32(trainer)
    if lora_config is None and isinstance(model, PeftModel):
        continued.settle_reference(trainer.model)
    if monitor is not None:
        monitor.save_now = trainer.save_now
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _keep_adapters_in_float32(trainer: RunTrainer) -> None:
    """Undo TRL's rounding of QLoRA's adapters to bfloat16, which swallows small steps.

    Autocast rounds them for each product, so the arithmetic is as fast.
    """
    if getattr(unwrap_peft(trainer.model), "is_loaded_in_4bit", False):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
