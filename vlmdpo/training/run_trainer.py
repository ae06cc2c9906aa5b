"""The trainer of `vlmdpo train`: the engine on prepared rows, for runs that must not be lost.

It renders prompts as everything here does (see `models.rendering`), keeps reference log-probs on
disk, trains mDPO, computes batches in parts that fit, writes checkpoints that are whole or absent,
and stops at a loss that is not finite.

Shapes: as in `trainer`.
"""

from __future__ import annotations

import contextvars
import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object
from peft import PeftModel
from torch.utils.data import DataLoader
from trl import DPOConfig, DPOTrainer

from vlmdpo.distributed.processes import launched_strategy
from vlmdpo.engine.reference_cache import ReferenceCache
from vlmdpo.engine.stock_collator import StockCollator
from vlmdpo.errors import ConfigError
from vlmdpo.models.adapters import REFERENCE
from vlmdpo.training import checkpoints, mdpo
from vlmdpo.training.auto_batch import LOSS_WEIGHT, PARTS, AutoBatch
from vlmdpo.training.finite_check import FiniteCheck, NonFiniteLoss
from vlmdpo.training.mdpo import MdpoCollator
from vlmdpo.training.token_count import TokenCount
from vlmdpo.training.trainer import PairTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

    from vlmdpo.models.protocols import Processor

# transformers asks `_get_output_dir` where a checkpoint goes, and passes nothing of ours to it.
# Set while a checkpoint is being written.
_unfinished_checkpoint: contextvars.ContextVar[Path | None] = contextvars.ContextVar(
    "vlmdpo_unfinished_checkpoint", default=None
)


class RunTrainer(PairTrainer):
    """`PairTrainer` on prepared pairs, as `vlmdpo train` runs it.

    Args:
        engine: "shared", "rows" or "stock", chosen and checked by the caller; see `engine_choice`.
        reference_cache: reference log-probs by answer. None: computed for every batch, as in TRL.
        mdpo: whether batches are mDPO's; see `training.mdpo`.
        others: arguments of `DPOTrainer`.

    Attributes:
        pair_collator: makes a batch of plain pairs, without mDPO's corrupted copies.
        tokens: those of the training batches so far.
        auto_batch: computes batches in parts that fit into memory.
        best_step: the step whose checkpoint is never removed; of `--keep-best`.
        has_real_values: False while a step is simulated, whose loss means nothing.
    """

    reference_cache: ReferenceCache | None

    def __init__(
        self,
        *,
        engine: str,
        processing_class: Processor,
        args: DPOConfig,
        reference_cache: ReferenceCache | None = None,
        mdpo: bool = False,
        **others: Any,
    ) -> None:
        # TRL needs a collator from the start; `use_engine` replaces it by the engine's.
        collator = StockCollator(processing_class, max_length=args.max_length)
        # Not PairTrainer's, which chooses an engine itself.
        DPOTrainer.__init__(
            self, processing_class=processing_class, args=args, data_collator=collator, **others
        )
        self._init_engine_state()
        self._stock_collator = collator
        self.reference_cache = reference_cache
        self.is_mdpo = mdpo
        self.auto_batch: AutoBatch | None = None
        self.best_step: Callable[[], int | None] = lambda: None
        self.has_real_values = True
        self.finite_check, self.tokens = FiniteCheck(), TokenCount()
        if reference_cache is not None and not isinstance(self.model, PeftModel):
            # Only TRL needed one: the policy itself fills the cache before it trains.
            self.ref_model = None
        self.use_engine(engine)

    def create_accelerator_and_postprocess(self) -> None:
        # accelerate runs DDP on CPUs even if FSDP is asked for, though torch can shard there too.
        self.is_fsdp_enabled: bool
        super().create_accelerator_and_postprocess()
        if launched_strategy() == "fsdp2" and not self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
            # Both, because accelerate copies one onto the other at various times.
            self.accelerator.state.distributed_type = PartialState().distributed_type = (
                DistributedType.FSDP
            )
            self.is_fsdp_enabled = True

    def _use_collators(self, engine: str) -> None:
        if self.is_mdpo and engine != "shared":
            raise ConfigError("--loss mdpo needs the shared engine, ruled out by model or --engine")
        self.pair_collator = (
            self._stock_collator if engine == "stock" else self._new_pair_collator(engine)
        )
        self.data_collator = self.pair_collator
        if self.is_mdpo:
            self.data_collator = MdpoCollator(
                self.processing_class,
                max_length=self.args.max_length,
                share_beginnings=self.pair_collator.share_beginnings,
                seed=self.args.seed,
            )

    # TRL would remove the column `row`, by which rows are named and collated again.
    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = vars(self)["_signature_columns"]
        self._signature_columns = [*(name for name in columns if name != "row"), "row"]

    # transformers takes one step too many when a run is resumed after its last step.
    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # A checkpoint is written to a hidden folder first: see `_save_checkpoint`.
    def _get_output_dir(self, trial: object) -> str:
        folder = _unfinished_checkpoint.get()
        return str(folder) if folder is not None else str(super()._get_output_dir(trial))

    # Killed while it saves, transformers would leave a checkpoint that looks complete. This one is
    # renamed once it is. Raises DataError if the disk is full.
    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        folder = Path(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        if (folder / checkpoints.checkpoint_name(self.state.global_step)).is_dir():
            return  # a resumed run stopped before its first step
        how = folder, self.state.global_step, self.args.save_total_limit, self.accelerator
        with checkpoints.atomic_checkpoint(*how, best_step=self.best_step()) as partial:
            token = _unfinished_checkpoint.set(partial)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                _unfinished_checkpoint.reset(token)
            if self.args.should_save:
                # PEFT saves every adapter, and transformers, where it finds a folder of one, reads
                # only such folders. The reference is read from where it came.
                written = partial / checkpoints.checkpoint_name(self.state.global_step)
                shutil.rmtree(written / REFERENCE, ignore_errors=True)

    def enable_auto_batch(self) -> None:
        """From now on compute a batch that does not fit into memory in parts; see `auto_batch`."""
        self.auto_batch = AutoBatch(self, super().training_step)

    # With auto batch size, a batch is collated in parts.
    def get_train_dataloader(self) -> DataLoader[Any]:
        if self.auto_batch is None:
            plain: DataLoader[Any] = super().get_train_dataloader()
            return plain
        # transformers builds the loader with `self.data_collator`, which evaluation needs as it is:
        # so the loader is built by a shallow copy that differs in its collator only.
        builder = copy.copy(self)
        builder.data_collator = self.auto_batch.collator
        loader: DataLoader[Any] = super(RunTrainer, builder).get_train_dataloader()
        return loader

    # Tokens are counted; with auto batch size a step may run in parts, and again.
    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        self.tokens.add(inputs[PARTS].batches if self.auto_batch is not None else [inputs])
        if self.auto_batch is None:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        return self.auto_batch.step(model, inputs[PARTS], num_items_in_batch)

    # A part of a batch counts by its share of the rows; see `AutoBatch`.
    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        weight = inputs.pop(LOSS_WEIGHT, 1.0)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss if weight == 1 else loss * weight

    # Loss and reference log-probs are checked before an optimizer step uses them.
    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        result = super()._compute_loss(model, inputs, return_outputs)
        self._expect_finite(inputs.get("row", []), result[0] if return_outputs else result)
        # Before the backward pass of a step's last batch, in which DeepSpeed's optimizer steps.
        if self.accelerator.sync_gradients or not self.model.training:
            self.check_finite()
        return result

    def _compute_reference_logps(
        self, model: nn.Module, inputs: dict[str, Any], rows: list[int]
    ) -> Tensor:
        logps_R = super()._compute_reference_logps(model, inputs, rows)
        self._expect_finite(rows, logps_R)
        return logps_R

    def _expect_finite(self, rows: list[int], *values: Tensor) -> None:
        """Have the loss or the reference log-probs of a batch checked by `check_finite`."""
        if self.has_real_values:
            self.finite_check.add(rows, *values)

    def check_finite(self) -> None:
        """Raise NonFiniteLoss for the first batch since the last check that was not finite."""
        rows = self.finite_check.first_non_finite()
        if rows is None:
            return
        evaluation = set(self.eval_dataset["row"]) if self.eval_dataset is not None else set()
        evaluated = bool(rows) and rows[0] in evaluation
        step = self.state.global_step + (0 if evaluated else 1)
        raise NonFiniteLoss(rows, step, evaluated=evaluated)

    # TRL averages metrics over batches, so that the rows of a small last batch would count more.
    # Here each row of the test split counts alike.
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any, Any]:
        metrics = self._metrics["eval"]
        count_before = {name: len(values) for name, values in metrics.items()}
        result: tuple[Tensor, Any, Any] = super().prediction_step(model, inputs, *args, **kwargs)
        metrics["loss"].append(self.accelerator.gather(result[0].detach()).mean().item())
        for name, values in metrics.items():
            start = count_before.get(name, 0)
            values[start:] = [value for value in values[start:] for _ in range(len(inputs["row"]))]
        return result

    def _loss_of_trl(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """TRL's loss; for mDPO also the metrics of its terms, from the same forward pass."""
        if not self.is_mdpo:
            return super()._loss_of_trl(model, inputs, return_outputs)
        policy_logps: list[Tensor] = []
        hook = model.register_forward_hook(
            lambda module, args, output: policy_logps.append(output.log_probs.detach().sum(1))
        )
        try:
            result = super()._loss_of_trl(model, inputs, return_outputs)
        finally:
            hook.remove()
        reference_logps = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        self._log_mdpo_metrics(policy_logps[0], reference_logps)
        return result

    def _log_mdpo_metrics(
        self, policy_logps_2P: Tensor, reference_logps: tuple[Tensor, Tensor]
    ) -> None:
        """Replace TRL's metrics, which mix the three terms, by those of the rows' own answers."""
        logged = self._metrics["train" if self.model.training else "eval"]
        metrics = mdpo.mdpo_metrics(policy_logps_2P, reference_logps, self.beta)
        values_BM = torch.stack(list(metrics.values()), dim=1)
        means = self.accelerator.gather(values_BM).mean(dim=0).tolist()  # read together
        for name, mean in zip(metrics, means, strict=True):
            if name in logged and not name.startswith(("rewards/conditional", "rewards/anchored")):
                logged[name][-1] = mean
            else:
                logged[name].append(mean)

    @property
    def datasets(self) -> list[Dataset]:
        """The rows that train and, if there are any, those that are evaluated on."""
        return [part for part in (self.train_dataset, self.eval_dataset) if part is not None]

    def save_now(self) -> None:
        """Write a checkpoint of the last whole step, and the reference log-probs."""
        self.save_reference_cache()
        self._save_checkpoint(self.model, None)

    def save_reference_cache(self) -> None:
        """Gather and write what the processes computed. Every process must call this."""
        if self.reference_cache is not None:
            is_distributed = self.accelerator.num_processes > 1
            of_all = gather_object(self.reference_cache.unsaved()) if is_distributed else []
            self.reference_cache.save(of_all, write=self.accelerator.is_main_process)
