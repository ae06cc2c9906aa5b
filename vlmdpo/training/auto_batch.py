"""Training that survives running out of memory, by computing each batch in parts.

When memory runs out, the batch is halved and the accumulation doubled. The data loader passes on
the same rows as ever, so the order of the data never changes; a batch that does not fit is computed
in two parts whose gradients add up to the same, and so are all batches that follow. What was done
of the failed step is undone: gradients are computed again from the rows of the whole optimizer
step, and metrics are counted once. With several processes all of them agree.

Parts are collated by the data loader, so in its workers, in as many parts as are wanted then. The
few batches that were on their way when memory ran out are collated again.
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

PARTS = "parts"  # where the data loader's batch holds its `Parts`
LOSS_WEIGHT = "loss_weight"  # the model input that says which share of a batch's loss a part is


@dataclass(frozen=True)
class Parts:
    """A batch of the data loader, collated in parts.

    Not one of the containers whose tensors accelerate moves to the device: all of them together may
    be what does not fit.

    Attributes:
        rows: its row numbers.
        batches: the collated parts, in the order of the rows.
    """

    rows: list[int]
    batches: list[dict[str, Any]]

    def pin_memory(self) -> Parts:
        """Called by the data loader, where it pins memory."""
        return Parts(self.rows, [_tensors(batch, Tensor.pin_memory) for batch in self.batches])


@dataclass(frozen=True)
class PartsCollator:
    """The data loader's collator: examples → {PARTS: Parts}.

    Args:
        collate: the trainer's collator.
        num_parts: into how many parts a batch is divided now; a number in shared memory, because
            the data loader's workers read it.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    num_parts: Tensor

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Parts]:
        rows, batches, start = [example["row"] for example in examples], [], 0
        for size in part_sizes(len(examples), int(self.num_parts)):
            batches.append(self.collate([dict(row) for row in examples[start : start + size]]))
            start += size
        return {PARTS: Parts(rows, batches)}


def part_sizes(rows: int, num_parts: int) -> list[int]:
    """How many rows each part of a batch has."""
    size = -(-rows // num_parts)
    return [min(size, rows - start) for start in range(0, rows, size)]


def _tensors(batch: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A batch with each tensor changed."""
    return {
        name: change(value) if isinstance(value, Tensor) else value for name, value in batch.items()
    }


@dataclass(frozen=True)
class _Metrics:
    """What TRL has counted so far: values since the last log, by mode and name, and tokens."""

    values: dict[str, dict[str, list[float]]]
    tokens: int


class AutoBatch:
    """Runs the trainer's steps in as many parts as memory requires.

    Args:
        trainer: the `RunTrainer`, whose collator makes a batch of rows.
        training_step: the trainer's own step of one collated batch, which computes gradients and
            returns the loss.
    """

    def __init__(self, trainer: DPOTrainer, training_step: Callable[..., Tensor]) -> None:
        self.trainer, self._training_step = trainer, training_step
        self._num_parts = torch.ones((), dtype=torch.long).share_memory_()
        self._window: list[Parts] = []  # the batches of this optimizer step so far

    @property
    def num_parts(self) -> int:
        """How many parts a batch of the data loader is computed in."""
        return int(self._num_parts)

    @property
    def collator(self) -> PartsCollator:
        """For the data loader."""
        return PartsCollator(self.trainer.data_collator, self._num_parts)

    @property
    def per_device_train_batch_size(self) -> int:
        """Pairs in a forward pass now."""
        return -(-self.trainer.args.per_device_train_batch_size // self.num_parts)

    def step(self, model: nn.Module, parts: Parts, num_items_in_batch: Tensor | None) -> Tensor:
        """Compute gradients of these rows; returns their loss.

        Raises MemoryBudgetError if not even a single pair fits.
        """
        earlier, failed = list(self._window), False
        self._window.append(parts)
        before = self._read_metrics()
        while True:
            loss, problem = self._try(
                model, earlier if failed else [], parts, before, num_items_in_batch
            )
            if not self._any_process(problem is not None):
                break
            self._halve(len(parts.rows), problem)
            model.zero_grad(set_to_none=True)
            self._restore_metrics(before)
            failed = True
        assert loss is not None
        self._merge_metrics_of_parts(before, len(parts.rows))
        self._average_metrics_over_processes(before)
        if self.trainer.accelerator.sync_gradients:
            self._average_gradients_over_processes(model)
            self._window.clear()
        return loss

    def _try(
        self,
        model: nn.Module,
        earlier: list[Parts],
        parts: Parts,
        metrics_before: _Metrics,
        num_items: Tensor | None,
    ) -> tuple[Tensor | None, str | None]:
        """(loss, None), or (None, PyTorch's message) if memory ran out."""
        try:
            with self._without_communication(model):
                for lost in earlier:  # their gradients were lost with the failed step
                    self._run_in_parts(model, lost, num_items)
                    self._restore_metrics(metrics_before)
                return self._run_in_parts(model, parts, num_items), None
        except (RuntimeError, MemoryError) as problem:
            if not is_out_of_memory(problem):
                raise
            return None, out_of_memory_reason(problem)

    def _run_in_parts(self, model: nn.Module, parts: Parts, num_items: Tensor | None) -> Tensor:
        sizes = part_sizes(len(parts.rows), self.num_parts)
        if len(parts.batches) != len(sizes):  # memory has run out since it was collated
            parts = self._collate_again(parts.rows)
        device, losses = self.trainer.accelerator.device, []
        for size, part in zip(sizes, parts.batches, strict=True):
            batch = _tensors(part, lambda tensor: tensor.to(device, non_blocking=True))
            batch[LOSS_WEIGHT] = size / len(parts.rows)
            losses.append(self._training_step(model, batch, num_items))
        return torch.stack(losses).sum()

    def _collate_again(self, rows: list[int]) -> Parts:
        dataset = self.trainer.train_dataset
        place = {row: index for index, row in enumerate(dataset["row"])}
        return self.collator([dataset[place[row]] for row in rows])[PARTS]

    def _halve(self, rows: int, problem: str | None) -> None:
        if self.num_parts >= rows:
            raise MemoryBudgetError(
                f"a single pair does not fit into memory ({problem or 'on another process'}); see "
                "vlmdpo estimate-memory --gpu"
            )
        self._num_parts *= 2
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
        shares = [size / rows for size in part_sizes(rows, self.num_parts)]
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
