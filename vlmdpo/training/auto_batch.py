"""Training that survives running out of memory, by computing each batch in parts.

When memory runs out, the batch is halved and the accumulation doubled. The data loader passes on
raw rows, so the order of the data never changes; a batch that does not fit is computed in two
parts whose gradients add up to the same, and so are all batches that follow. What was done of the
failed step is undone: gradients are computed again from the rows of the whole optimizer step, and
metrics are counted once. With several processes all of them agree.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmdpo import ui
from vlmdpo.errors import MemoryBudgetError, is_out_of_memory, out_of_memory_reason

if TYPE_CHECKING:
    from trl import DPOTrainer

Rows = list[dict[str, Any]]
LOSS_WEIGHT = "loss_weight"  # the model input that says which share of a batch's loss a part is


def keep_uncollated(examples: Rows) -> dict[str, Rows]:
    """The data loader's collator: how many rows are collated is known only when a step runs."""
    return {"examples": examples}


@dataclass(frozen=True)
class _Metrics:
    """What TRL has counted so far: values since the last log, by mode and name, and tokens."""

    values: dict[str, dict[str, list[float]]]
    tokens: int


class AutoBatch:
    """Runs the trainer's steps in as many parts as memory requires.

    Args:
        trainer: the `PairTrainer`, whose collator makes a batch of rows.
        training_step: the trainer's own step of one collated batch, which computes gradients and
            returns the loss.
    """

    def __init__(self, trainer: DPOTrainer, training_step: Callable[..., Tensor]) -> None:
        self.trainer, self._training_step = trainer, training_step
        self.num_parts = 1  # how many parts a batch of the data loader is computed in
        self._window: list[Rows] = []  # the rows of this optimizer step so far

    @property
    def per_device_train_batch_size(self) -> int:
        """Pairs in a forward pass now."""
        return -(-self.trainer.args.per_device_train_batch_size // self.num_parts)

    def step(self, model: nn.Module, examples: Rows, num_items_in_batch: Tensor | None) -> Tensor:
        """Compute gradients of these rows; returns their loss.

        Raises MemoryBudgetError if not even a single pair fits.
        """
        earlier, failed = list(self._window), False
        self._window.append(examples)
        before = self._read_metrics()
        while True:
            loss, problem = self._try(
                model, earlier if failed else [], examples, before, num_items_in_batch
            )
            if not self._any_process(problem is not None):
                break
            self._halve(len(examples), problem)
            model.zero_grad(set_to_none=True)
            self._restore_metrics(before)
            failed = True
        assert loss is not None
        self._merge_metrics_of_parts(before, len(examples))
        self._average_metrics_over_processes(before)
        if self.trainer.accelerator.sync_gradients:
            self._average_gradients_over_processes(model)
            self._window.clear()
        return loss

    def _try(
        self,
        model: nn.Module,
        earlier: list[Rows],
        examples: Rows,
        metrics_before: _Metrics,
        num_items: Tensor | None,
    ) -> tuple[Tensor | None, str | None]:
        """(loss, None), or (None, PyTorch's message) if memory ran out."""
        try:
            with self._without_communication(model):
                for rows in earlier:  # their gradients were lost with the failed step
                    self._run_in_parts(model, rows, num_items)
                    self._restore_metrics(metrics_before)
                return self._run_in_parts(model, examples, num_items), None
        except (RuntimeError, MemoryError) as problem:
            if not is_out_of_memory(problem):
                raise
            return None, out_of_memory_reason(problem)

    def _part_sizes(self, rows: int) -> list[int]:
        size = -(-rows // self.num_parts)
        return [min(size, rows - start) for start in range(0, rows, size)]

    def _run_in_parts(self, model: nn.Module, rows: Rows, num_items: Tensor | None) -> Tensor:
        losses, start = [], 0
        for size in self._part_sizes(len(rows)):
            part = rows[start : start + size]
            batch = self.trainer.data_collator([dict(row) for row in part])
            batch[LOSS_WEIGHT] = size / len(rows)
            losses.append(self._training_step(model, batch, num_items))
            start += size
        return torch.stack(losses).sum()

    def _halve(self, rows: int, problem: str | None) -> None:
        if self.num_parts >= rows:
            raise MemoryBudgetError(
                f"a single pair does not fit into memory ({problem or 'on another process'}); see "
                "vlmdpo estimate-memory --gpu"
            )
        self.num_parts *= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        accumulation = self.trainer.args.gradient_accumulation_steps * self.num_parts
        ui.warn(
            f"out of memory at step {self.trainer.state.global_step + 1}: continuing with batch "
            f"{self.per_device_train_batch_size} and {accumulation} accumulation steps; the "
            "effective batch stays the same"
        )

    # With several processes, one that ran out of memory must not leave the others waiting in a
    # collective call. So there is none while a step is computed; afterwards gradients and metrics
    # are averaged as they would have been.

    @property
    def _is_distributed(self) -> bool:
        return bool(self.trainer.accelerator.num_processes > 1)

    def _any_process(self, here: bool) -> bool:
        """Whether this holds in any process."""
        if not self._is_distributed:
            return here
        flag = torch.tensor(float(here), device=self.trainer.accelerator.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    @contextlib.contextmanager
    def _without_communication(self, model: nn.Module) -> Iterator[None]:
        """Inside, no process waits for another."""
        if not self._is_distributed:
            yield
            return
        accelerator = self.trainer.accelerator
        if hasattr(model, "broadcast_buffers"):
            # DDP would send buffers, which are constants here, in every forward pass.
            model.broadcast_buffers = False  # type: ignore[assignment]
        gathering = accelerator.gather, accelerator.gather_for_metrics
        # TRL gathers metrics in the middle of a step.
        accelerator.gather = accelerator.gather_for_metrics = lambda value, *a, **k: value
        try:
            no_sync = getattr(model, "no_sync", contextlib.nullcontext)  # DDP's
            with no_sync():
                yield
        finally:
            accelerator.gather, accelerator.gather_for_metrics = gathering

    def _average_gradients_over_processes(self, model: nn.Module) -> None:
        if not self._is_distributed:
            return
        count = self.trainer.accelerator.num_processes
        for parameter in model.parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= count

    def _read_metrics(self) -> _Metrics:
        return _Metrics(copy.deepcopy(self.trainer._metrics), self.trainer._total_train_tokens)

    def _restore_metrics(self, metrics: _Metrics) -> None:
        self.trainer._metrics = copy.deepcopy(metrics.values)
        self.trainer._total_train_tokens = metrics.tokens

    def _merge_metrics_of_parts(self, before: _Metrics, rows: int) -> None:
        """Replace the parts' metrics by those of the batch: TRL's averages weigh entries alike."""
        shares = [size / rows for size in self._part_sizes(rows)]
        for name, values in self.trainer._metrics["train"].items():
            old = before.values["train"][name]
            new = values[len(old) :]
            if len(new) == len(shares) > 1:
                whole = sum(share * value for share, value in zip(shares, new, strict=True))
                self.trainer._metrics["train"][name] = [*old, whole]

    def _average_metrics_over_processes(self, before: _Metrics) -> None:
        if not self._is_distributed:
            return
        from accelerate.utils import gather_object

        trainer, old = self.trainer, before.values["train"]
        new = {name: values[len(old[name]) :] for name, values in trainer._metrics["train"].items()}
        gathered = gather_object([(new, trainer._total_train_tokens - before.tokens)])
        trainer._total_train_tokens = before.tokens + sum(tokens for _, tokens in gathered)
        for name, values in new.items():
            columns = [
                theirs[name] for theirs, _ in gathered if len(theirs.get(name, ())) == len(values)
            ]
            averages = [sum(column) / len(columns) for column in zip(*columns, strict=True)]
            trainer._metrics["train"][name] = [*old[name], *averages]
        trainer._metrics["train"]["num_tokens"] = [trainer._total_train_tokens]
