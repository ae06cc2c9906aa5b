"""Checks around a run: before it is paid for, as `--doctor`, and of what it saves."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from vlmdpo import ui
from vlmdpo.config import LoraOptions
from vlmdpo.errors import ModelError
from vlmdpo.models import load
from vlmdpo.training import doctor, engine_choice
from vlmdpo.training.prefill import fill_reference_cache
from vlmdpo.training.prompt_check import check_prompts
from vlmdpo.training.setup import TrainingSetup

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainerControl, TrainerState, TrainingArguments


class ShardedPreflight(TrainerCallback):
    """The checks before a run with sharded weights: once they are sharded, all processes together.

    Raises ModelError if the engine is not exact; switching it would be too late by then.
    """

    def __init__(self, setup: TrainingSetup) -> None:
        self.setup = setup

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.setup.trainer
        engine = trainer.engine
        engine_choice.verify_engine(self.setup)
        if trainer.engine != engine:
            raise ModelError(
                f"no shared prefix ({self.setup.fallback_reason}); run it with --engine stock, or "
                "on one GPU"
            )
        if not state.global_step:  # the policy of a resumed run is no longer the reference
            _check_start(self.setup)


def check_before_training(setup: TrainingSetup, options: LoraOptions) -> None:
    """The short checks before a run; then fill the reference cache if only now it can be filled.

    Raises ModelError if the run could not learn, and warns if it would learn less. A sharded model
    is checked later, by `ShardedPreflight`.
    """
    if not setup.is_sharded:
        _check_start(setup)
    trainer = setup.trainer
    if trainer.reference_cache is not None and not options.lora:
        fill_reference_cache(trainer)


def _check_start(setup: TrainingSetup) -> None:
    checks = doctor.check_setup(setup.trainer, setup.examples())
    for check in checks:
        if check.passed is False:
            ui.warn(f"check: {check.name}: {check.seen}. Likely cause: {check.cause}")
    loss = checks[0]
    if not loss.passed:
        raise ModelError(f"the loss at step 0 is {loss.seen}, not ln 2. Likely cause: {loss.cause}")
    ui.say("checks: " + "; ".join(f"{check.name} ({check.seen})" for check in checks))


def run_doctor(setup: TrainingSetup, options: LoraOptions) -> dict[str, Any]:
    """`--doctor`: run every check, print a table, return the report.

    Raises ModelError if a check fails.
    """
    trainer = setup.trainer
    checks = [
        engine_choice.engine_check(setup),
        *doctor.check_setup(trainer, setup.examples()),
        check_prompts(trainer, setup.examples()[0]),
    ]
    if options.lora and not trainer.args.process_index:
        with tempfile.TemporaryDirectory() as folder:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(
                folder, selected_adapters=["default"], save_embedding_layers=False
            )
            checks.append(doctor.check_saved_adapter(trainer, setup.examples()[0], Path(folder)))
    marks = {True: "yes", False: "NO", None: "-"}
    rows = [[check.name, marks[check.passed], check.seen] for check in checks]
    ui.table("Before training", ["Check", "Holds", "Seen"], rows, text=(0, 1, 2))
    for check in checks:
        if check.passed is False:
            raise ModelError(_failure(check))
    return {
        "checks": [vars(check) for check in checks],
        "engine": trainer.engine,
        "fallback_reason": setup.fallback_reason,
    }


def check_saved(
    setup: TrainingSetup, weights: dict[str, Tensor] | None, folder: Path, options: LoraOptions
) -> None:
    """Raise ModelError unless what was saved in `folder` equals the live model.

    Args:
        weights: the full weights gathered from all processes; None if each process has them.
    """
    trainer = setup.trainer
    if weights is not None:
        check = doctor.check_saved_files(trainer, weights, folder, adapter=options.lora)
    elif options.lora:
        check = doctor.check_saved_adapter(trainer, setup.examples()[0], folder)
    else:
        live = trainer.accelerator.unwrap_model(trainer.model)
        dtype = str(live.dtype).removeprefix("torch.")
        check = doctor.check_saved_model(
            live, load.load_model(str(folder), dtype=dtype, device="cpu")
        )
    if not check.passed:
        raise ModelError(_failure(check))


def _failure(check: doctor.Check) -> str:
    return f"{check.name}: {check.seen}. Likely cause: {check.cause}"
