"""Training that survives running out of memory: the batch is halved, the accumulation doubled, and
nothing is lost.

The data loader hands on raw rows, so the order of the data never changes; a batch that does not fit
is computed in two parts whose gradients add up to the same, and so are all that follow. What the
parts of the broken step had done is undone: gradients are made anew from the rows of the whole
optimizer step, metrics are counted once. Under several processes all agree.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vlmdpo import ui
from vlmdpo.errors import MemoryBudgetError

Rows = list[dict[str, Any]]


LOSS_WEIGHT = "loss_weight"  # the model input that says which share of a batch's loss a part is


def keep_uncollated(examples: Rows) -> dict[str, Any]:
    """The data loader's collator under auto batch size: how many rows a forward pass takes is known
    only when it runs.
    """
    return {"examples": examples}


class AutoBatch:
    """Runs the trainer's steps in as many parts as memory demands.

    Args:
        trainer: the `PairTrainer`, whose collator makes a batch of rows.
        plain: the trainer's own `training_step` of one collated batch, which computes gradients and
            returns the loss.
    """

    def __init__(self, trainer: Any, plain: Callable[..., torch.Tensor]) -> None:
        self.trainer, self.plain = trainer, plain
        self.parts = 1  # how many a batch of the data loader is computed in
        self._window: list[Rows] = []  # the rows of this optimizer step so far

    @property
    def per_device_train_batch_size(self) -> int:
        """Pairs in a forward pass now."""
        return -(-self.trainer.args.per_device_train_batch_size // self.parts)

    def step(self, model: Any, examples: Rows, num_items_in_batch: Any) -> torch.Tensor:
        """Gradients of these rows, and their loss. Raises MemoryBudgetError where a single pair
        does not fit.
        """
        accelerator = self.trainer.accelerator
        before, broken = list(self._window), False
        self._window.append(examples)
        kept = self._metrics()
        while True:
            loss, problem = self._try(
                model, before if broken else [], examples, kept, num_items_in_batch
            )
            if not self._anywhere(problem is not None):
                break
            self._halve(len(examples), problem)
            model.zero_grad(set_to_none=True)
            self._put_metrics(kept)
            broken = True
        assert loss is not None
        self._as_one(kept, len(examples))
        self._share_metrics(kept)
        if accelerator.sync_gradients:
            self._share_gradients(model)
            self._window.clear()
        return loss

    def _try(
        self, model: Any, before: list[Rows], examples: Rows, kept: Any, num_items: Any
    ) -> tuple[torch.Tensor | None, str | None]:
        """(loss, None), or (None, what was said when memory ran out)."""
        try:
            with self._alone(model):
                for rows in before:  # their gradients went with the broken step
                    self._run(model, rows, num_items)
                    self._put_metrics(kept)
                return self._run(model, examples, num_items), None
        except torch.OutOfMemoryError as problem:
            return None, str(problem).splitlines()[0]

    def _run(self, model: Any, rows: Rows, num_items: Any) -> torch.Tensor:
        size = -(-len(rows) // self.parts)
        losses = []
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            batch = self.trainer.data_collator([dict(row) for row in some])
            batch[LOSS_WEIGHT] = len(some) / len(rows)
            losses.append(self.plain(model, batch, num_items))
        return torch.stack(losses).sum()

    def _halve(self, rows: int, problem: str | None) -> None:
        if self.parts >= rows:
            raise MemoryBudgetError(
                f"a single pair does not fit into memory ({problem or 'on another process'}); see "
                "vlmdpo estimate-memory --gpu"
            )
        self.parts *= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        step, accumulated = (
            self.trainer.state.global_step + 1,
            self.trainer.args.gradient_accumulation_steps * self.parts,
        )
        ui.warn(
            f"out of memory at step {step}: going on with batch "
            f"{self.per_device_train_batch_size} and {accumulated} "
            "accumulation steps; the effective batch is the same"
        )

    # Several processes: one that ran out of memory must not leave the others waiting in a
    # collective call. So there is none while a step is computed; afterwards gradients and metrics
    # are brought together as they would have been.

    @property
    def _many(self) -> bool:
        return bool(self.trainer.accelerator.num_processes > 1)

    def _anywhere(self, here: bool) -> bool:
        if not self._many:
            return here
        flag = torch.tensor(float(here), device=self.trainer.accelerator.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    @contextlib.contextmanager
    def _alone(self, model: Any) -> Iterator[None]:
        if not self._many:
            yield
            return
        accelerator = self.trainer.accelerator
        if hasattr(
            model, "broadcast_buffers"
        ):  # DDP would send them, which are constants here, with every forward pass
            model.broadcast_buffers = False
        found = accelerator.gather, accelerator.gather_for_metrics
        accelerator.gather = accelerator.gather_for_metrics = lambda value, *a, **k: value
        try:
            with model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext():
                yield
        finally:
            accelerator.gather, accelerator.gather_for_metrics = found

    def _share_gradients(self, model: Any) -> None:
        if not self._many:
            return
        count = self.trainer.accelerator.num_processes
        for parameter in model.parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= count

    def _metrics(self) -> tuple[Any, int]:
        return copy.deepcopy(self.trainer._metrics), self.trainer._total_train_tokens

    def _put_metrics(self, kept: tuple[Any, int]) -> None:
        self.trainer._metrics, self.trainer._total_train_tokens = copy.deepcopy(kept[0]), kept[1]

    def _as_one(self, kept: tuple[Any, int], rows: int) -> None:
        """The metrics of the parts as if they had been one batch, so that TRL's averages weigh
        every batch alike.
        """
        size = -(-rows // self.parts)
        shares = [min(size, rows - start) / rows for start in range(0, rows, size)]
        for name, values in self.trainer._metrics["train"].items():
            before = kept[0]["train"][name]
            fresh = values[len(before) :]
            if len(fresh) == len(shares) > 1:
                whole = sum(share * value for share, value in zip(shares, fresh, strict=True))
                self.trainer._metrics["train"][name] = [*before, whole]

    def _share_metrics(self, kept: tuple[Any, int]) -> None:
        if not self._many:
            return
        from accelerate.utils import gather_object

        trainer, (metrics, tokens) = self.trainer, kept
        fresh = {
            name: values[len(metrics["train"][name]) :]
            for name, values in trainer._metrics["train"].items()
        }
        everyone = gather_object([(fresh, trainer._total_train_tokens - tokens)])
        trainer._total_train_tokens = tokens + sum(count for _, count in everyone)
        for name, values in fresh.items():
            theirs = [one[name] for one, _ in everyone if len(one.get(name, ())) == len(values)]
            averages = [sum(column) / len(theirs) for column in zip(*theirs, strict=True)]
            trainer._metrics["train"][name] = [*metrics["train"][name], *averages]
        trainer._metrics["train"]["num_tokens"] = [trainer._total_train_tokens]
