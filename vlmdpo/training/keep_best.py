"""`--keep-best`: the weights that are best on the test split are the run's result.

transformers' own way needs saving and evaluation in step, and knows checkpoints by a path that ours
do not have yet while they are written.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from vlmdpo import ui
from vlmdpo.config.training import BEST_BY
from vlmdpo.training import checkpoints

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from vlmdpo.training.monitor import TrainingMonitor
    from vlmdpo.training.run_trainer import RunTrainer


class KeepBest(TrainerCallback):
    """Saves a checkpoint at each best evaluation, and stops a run that has none for a while.

    What was best is read off the run's evaluations, so that a resumed run knows it too.

    Args:
        folder: the run's output folder.
        by: a key of `BEST_BY`.
        patience: evaluations in a row that may be no better; None for all.
        monitor: has the evaluations. It must be called first.

    Attributes:
        stopped_early: whether patience ended the run.
    """

    def __init__(
        self, folder: Path, by: str, patience: int | None, monitor: TrainingMonitor
    ) -> None:
        self.folder, self.by, self.patience, self.monitor = folder, by, patience, monitor
        self.stopped_early = False

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best = self.best()
        if best is None or best["step"] == state.global_step:
            control.should_save = True
            return
        since = [line for line in self.monitor.evaluations if line["step"] > best["step"]]
        if self.patience is not None and len(since) >= self.patience:
            self.stopped_early = control.should_training_stop = True
            ui.say(
                f"stopped at step {state.global_step}: {len(since)} evaluations in a row were no "
                f"better than that of step {best['step']}"
            )

    def best(self) -> dict[str, Any] | None:
        """The best evaluation so far, of several equal ones the first; None before there is one.

        Of earlier ones, only those whose checkpoint is there can be returned to.
        """
        metric, sign = BEST_BY[self.by]
        evaluations = self.monitor.evaluations
        last = evaluations[-1]["step"] if evaluations else 0
        known = {path.name for path in checkpoints.list_checkpoints(self.folder)}
        kept = [
            line
            for line in evaluations
            if line["step"] == last or checkpoints.checkpoint_name(line["step"]) in known
        ]
        return max(kept, key=lambda line: sign * line[metric], default=None)

    def summary(self) -> dict[str, Any] | None:
        """What was kept and by what it was judged, for the report; None without an evaluation."""
        best = self.best()
        if best is None:
            return None
        metric, _ = BEST_BY[self.by]
        last = self.monitor.evaluations[-1]
        return {
            "step": best["step"],
            "judged_by": f"eval_{metric}",
            "value": best[metric],
            "last_step": last["step"],
            "last_value": last[metric],
            "evaluations": len(self.monitor.evaluations),
            "stopped_early": self.stopped_early,
        }

    def restore(self, trainer: RunTrainer) -> None:
        """Give the model the weights of the best evaluation. Every process must call this."""
        best = self.best()
        if best is None or best["step"] == trainer.state.global_step:
            return
        folder = self.folder / checkpoints.checkpoint_name(best["step"])
        # transformers' own, which knows adapters and sharded weights; it takes a resumed run there.
        trainer._load_from_checkpoint(
            str(folder), trainer.model_wrapped if trainer.is_fsdp_enabled else None
        )
        ui.say(f"the result is {folder.name}, the best on the test split by {self.by}")
