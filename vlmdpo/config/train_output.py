"""What a training leaves behind and what is checked before it: options of `vlmdpo train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vlmdpo.config.common import OutputOptions
from vlmdpo.config.options import (
    Options,
    option,
    require_at_least,
    require_choice,
    require_positive,
)
from vlmdpo.errors import ConfigError

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "clearml", "swanlab")


@dataclass(frozen=True, kw_only=True)
class TrainOutputOptions(OutputOptions):
    """What a training leaves behind, and how an earlier one is treated."""

    group: ClassVar[str] = "Output"

    output_dir: Path | None = option(
        None,
        "Folder for adapter, processor, metrics and curves",
        default_text="outputs/<model>-<dataset>-dpo",
        common=True,
    )
    resume: bool = option(
        False,
        "Continue from the last checkpoint in the output folder, or start if there is none",
        common=True,
    )
    overwrite: bool = option(False, "Replace an earlier run in the output folder")
    logging_steps: float = option(10.0, "Optimizer steps between two lines of metrics")
    save_steps: float = option(500.0, "Optimizer steps between two checkpoints")
    save_total_limit: int = option(2, "Number of checkpoints to keep")
    sample_every: int | None = option(
        None,
        "Optimizer steps between sample answers, kept in samples.jsonl and run.html; 0 for none",
        default_text="before the first step and after the last",
    )
    report_to: str = option(
        "none", f"Comma-separated trackers that get the metrics: {', '.join(TRACKERS)}; or none"
    )

    def _check(self) -> None:
        require_positive(self, "logging_steps", "save_steps")
        require_at_least(self, 1, "save_total_limit")
        require_at_least(self, 0, "sample_every")
        for name in self.trackers():
            require_choice(name, TRACKERS, "report_to")
        if self.resume and self.overwrite:
            raise ConfigError("--resume continues what --overwrite would delete; choose one")

    def trackers(self) -> tuple[str, ...]:
        """The names in `--report-to`; empty for none."""
        names = (part.strip() for part in self.report_to.split(","))
        return tuple(name for name in names if name not in ("none", ""))


@dataclass(frozen=True, kw_only=True)
class CheckOptions(Options):
    """What is checked before or beside a training."""

    group: ClassVar[str] = "Checks"

    dry_run: bool = option(
        False,
        "Show what the run would be, its steps and memory, and stop: offline, nothing is loaded",
        common=True,
    )
    doctor: bool = option(
        False,
        "Check engine, data and model on a few rows, show the findings, and stop before training",
        common=True,
    )
    gpu: str | None = option(
        None,
        "With --dry-run, the GPUs to judge for: rtx-4090, 24GiB, 8xa100-80gb ...",
        default_text="no verdict",
    )
    foresee_memory: bool | None = option(
        None,
        "Estimate the peak memory in a separate process, and show the measured one beside it",
        default_text="on a GPU",
    )

    def _check(self) -> None:
        if self.gpu is not None and not self.dry_run:
            raise ConfigError("--gpu needs --dry-run; a training uses the GPUs that are present")
