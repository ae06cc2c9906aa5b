"""The error message for a loss that is NaN or infinite: which rows cause it, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlmdpo.data import store
from vlmdpo.errors import ModelError

if TYPE_CHECKING:
    from vlmdpo.training.finite_check import NonFiniteLoss
    from vlmdpo.training.setup import TrainingSetup

_NAMED_ROWS = 8


def explain_non_finite_loss(
    setup: TrainingSetup, problem: NonFiniteLoss, folder: Path
) -> ModelError:
    """The error that names the rows.

    Args:
        folder: the run's output folder, with its checkpoints.
    """
    from vlmdpo.training import checkpoints

    last = next(iter(reversed(checkpoints.list_checkpoints(folder))), None)
    broken = _broken_before(setup, problem.step)
    if broken:
        return ModelError(
            f"the loss of step {problem.step} is not finite, because weights held NaN or infinity "
            f"before it: {', '.join(broken[:3])}{' ...' if len(broken) > 3 else ''}; no learning "
            "rate mends that: resume from an earlier checkpoint, or start again with --overwrite"
        )
    advice = "lower --learning-rate"
    if last:
        advice += f" and continue from {last.name} with --resume"
    rows = sorted(set(problem.rows))
    bad = _non_finite_rows(setup, rows)
    if problem.evaluated:
        manifest = store.read_manifest(setup.data) or {}
        first = bad[0] - manifest["splits"]["train"]  # numbered after the rows that train
        return ModelError(
            f"after step {problem.step} the loss on the test split is not finite, in {len(bad)} of "
            f"the {len(rows)} rows of a batch, first in its row {first} (counted from 0); "
            f"{advice}, or train without evaluation: --eval-steps 0"
        )
    named = ", ".join(map(str, bad[:_NAMED_ROWS])) + (" ..." if len(bad) > _NAMED_ROWS else "")
    if len(bad) < len(rows):
        return ModelError(
            f"the loss of step {problem.step} is not finite, because of row {named}, counted "
            f"from 0 (look at it: vlmdpo prepare --show {bad[0]}); remove it from the data, or "
            f"{advice}"
        )
    return ModelError(
        f"the loss of step {problem.step} is not finite, for every row of its batch ({named}, "
        f"counted from 0); {advice}"
    )


def _broken_before(setup: TrainingSetup, step: int) -> list[str]:
    """The weights that were not finite before this run's first step; none once it took one."""
    from vlmdpo.models.weights import non_finite

    if setup.is_sharded or step > setup.monitor.began_at + 1:
        return []
    return non_finite(setup.trainer.model.named_parameters())


def _non_finite_rows(setup: TrainingSetup, rows: list[int]) -> list[int]:
    """The rows whose log-probs are not finite by themselves; all if no row can be run alone."""
    from vlmdpo.training import doctor

    trainer = setup.trainer
    if setup.is_sharded:
        return rows
    places = {
        row: (part, index) for part in trainer.datasets for index, row in enumerate(part["row"])
    }

    def is_finite(row: int) -> bool:
        part, index = places[row]
        batch = trainer.pair_collator([dict(part[index])])
        return all(bool(logps.isfinite().all()) for logps in doctor.token_logps(trainer, batch))

    return [row for row in rows if not is_finite(row)] or rows
