"""The DPOTrainer subclass: TRL's trainer, loss and metrics, fed by the pair engine.

Nothing of the loss is written here: the batch is shaped so that TRL's code reads it as its own.
Every method of TRL and transformers that is overridden is listed in `trl_contract`, with why.

Shapes: B rows of a batch; P pairs that TRL sees in it, B or with mDPO 3B; R = 2P rows of its
loss, one for each answer, chosen ones first.
"""

from __future__ import annotations

import contextvars
import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object
from peft import PeftModel
from torch.utils.data import DataLoader
from trl import DPOConfig, DPOTrainer

from vlmdpo.distributed.processes import launched_strategy
from vlmdpo.engine.batch import image_token_ids
from vlmdpo.engine.batch_context import BATCH_CONTEXT
from vlmdpo.engine.collate import PairCollator
from vlmdpo.engine.content_keys import pair_keys
from vlmdpo.engine.devices import to_device
from vlmdpo.engine.feature_cache import FeatureCache
from vlmdpo.engine.forward import SharedForward
from vlmdpo.engine.reference_cache import ReferenceCache
from vlmdpo.engine.stock_collator import StockCollator
from vlmdpo.errors import ConfigError
from vlmdpo.models.adapters import adapters_off
from vlmdpo.models.families import has_bidirectional_prompt, unwrap_peft
from vlmdpo.models.inputs import in_dtype, take_host_only
from vlmdpo.training import checkpoints, mdpo
from vlmdpo.training.auto_batch import LOSS_WEIGHT, PARTS, AutoBatch
from vlmdpo.training.finite_check import FiniteCheck, NonFiniteLoss
from vlmdpo.training.mdpo import MdpoCollator
from vlmdpo.training.row_order import grouped_sampler
from vlmdpo.training.sharding import any_process_needs, checkpointable_layers
from vlmdpo.training.token_count import TokenCount

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn
    from torch.utils.data import Sampler

    from vlmdpo.data.groups import RowGroups
    from vlmdpo.models.protocols import Processor

# transformers asks `_get_output_dir` where a checkpoint goes, and passes nothing of ours to it.
# Set while a checkpoint is being written.
_unfinished_checkpoint: contextvars.ContextVar[Path | None] = contextvars.ContextVar(
    "vlmdpo_unfinished_checkpoint", default=None
)


class PairTrainer(DPOTrainer):
    """TRL's `DPOTrainer` on prepared pairs, with one of three engines.

    Args:
        engine: "shared" runs image and prompt once for both answers; "rows" gives each answer its
            own row but encodes each image once, for models that cannot share; "stock" is TRL
            unchanged.
        reference_cache: reference log-probs by answer. None: computed for every batch, as in TRL.
        mdpo: whether batches are mDPO's; see `training.mdpo`.
        others: arguments of `DPOTrainer`.

    Attributes:
        pair_collator: makes a batch of plain pairs, without mDPO's corrupted copies.
        feature_cache: image features on disk; takes effect with the next `use_engine`.
        row_lengths, row_groups: what rows are grouped by: their tokens, and what they share.
        tokens: those of the training batches so far.
        auto_batch: computes batches in parts that fit into memory.
        best_step: the step whose checkpoint is never removed; of `--keep-best`.
        checkpointed_layers: how many language layers recompute; None for all (shared: all but one).
        has_real_values: False while a step is simulated, whose loss means nothing.
    """

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
        super().__init__(
            processing_class=processing_class, args=args, data_collator=collator, **others
        )
        self.reference_cache = reference_cache
        self.is_mdpo = mdpo
        self.feature_cache: FeatureCache | None = None
        self.row_lengths: list[int] | None = None
        self.row_groups: RowGroups | None = None
        self.auto_batch: AutoBatch | None = None
        self.best_step: Callable[[], int | None] = lambda: None
        self.checkpointed_layers: int | None = None
        self.shared_forwards: list[SharedForward] = []
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

    def use_engine(self, engine: str) -> None:
        """Switch policy and reference model to this engine's batches from now on."""
        for shared in self.shared_forwards:
            shared.remove()
        self.engine, self.shared_forwards = engine, []
        processor, limit = self.processing_class, self.args.max_length
        if self.is_mdpo and engine != "shared":
            raise ConfigError("--loss mdpo needs the shared engine, ruled out by model or --engine")
        self.pair_collator: PairCollator | StockCollator = (
            StockCollator(processor, max_length=limit)
            if engine == "stock"
            else PairCollator(
                processor,
                max_length=limit,
                share=engine == "shared",
                share_beginnings=not has_bidirectional_prompt(unwrap_peft(self.model).base_model),
            )
        )
        self.data_collator: Any = self.pair_collator
        if self.is_mdpo:
            self.data_collator = MdpoCollator(processor, max_length=limit, seed=self.args.seed)
        if engine == "stock":
            return
        models = [self.model] + ([self.ref_model] if self.ref_model is not None else [])
        # The reference model of full fine-tuning has a vision tower of its own.
        caches = [self.feature_cache] + [None] * (len(models) - 1)
        self.shared_forwards = [
            SharedForward(
                model,
                share=engine == "shared",
                features=cache,
                gradient_in_every_batch=self.accelerator.num_processes > 1,
            )
            for model, cache in zip(models, caches, strict=True)
        ]

    # TRL would remove the column `row`, by which rows are named and collated again.
    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = vars(self)["_signature_columns"]
        self._signature_columns = [*(name for name in columns if name != "row"), "row"]

    # transformers' grouping by length is not the same in all processes and after a resume.
    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        sampler = grouped_sampler(self.row_groups, self.row_lengths, self.args)
        return sampler if sampler is not None else super()._get_train_sampler(train_dataset)

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
        loader: DataLoader[Any] = super(PairTrainer, builder).get_train_dataloader()
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

    # Pixels are float32, and not every vision tower casts them to the type of its weights.
    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return in_dtype(super()._prepare_inputs(inputs), self.model.dtype)

    # TRL's loss, given what is computed once per batch and what the cache holds.
    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        inputs = dict(inputs)
        rows, image_keys, answer_keys = take_host_only(inputs)
        if self.shared_forwards:
            # TRL passes every input that it does not know on to the model.
            ids = image_token_ids(inputs)
            inputs[BATCH_CONTEXT] = self.shared_forwards[0].new_batch(image_keys, ids)
        if self.reference_cache is not None or self.is_mdpo:
            logps_R = self.reference_logps(model, inputs, rows, answer_keys)
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = logps_R.chunk(2)
            self.precompute_ref_logps = True  # TRL then takes them from the batch
        self._set_checkpointing()
        result = self._loss_with_mdpo_metrics(model, inputs, return_outputs)
        loss = result[0] if return_outputs else result
        self._expect_finite(rows, loss)
        # Before the backward pass of a step's last batch, in which DeepSpeed's optimizer steps.
        if self.accelerator.sync_gradients or not self.model.training:
            self.check_finite()
        return result

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

    def _set_checkpointing(self) -> None:
        """Switch off recomputation where it saves nothing, or where `checkpointed_layers` says so.

        For every batch, because TRL switches all of it on again after each reference forward.
        """
        reentrant = (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        if self.shared_forwards and not reentrant:
            self.shared_forwards[0].remove_input_gradient_hooks()
        layers = checkpointable_layers(self.model)
        count = self.checkpointed_layers
        if count is None and self.engine == "shared":
            # The backward pass begins with the last layer: dropping its activations saves nothing.
            count = max(1, len(layers) - 1)
        for layer in layers[count:] if count is not None else ():
            layer.gradient_checkpointing = False

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

    def _loss_with_mdpo_metrics(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool
    ) -> Any:
        """TRL's loss; for mDPO also the metrics of its terms, from the same forward pass."""
        if not self.is_mdpo:
            return super()._compute_loss(model, inputs, return_outputs)
        policy_logps: list[Tensor] = []
        hook = model.register_forward_hook(
            lambda module, args, output: policy_logps.append(output.log_probs.detach().sum(1))
        )
        try:
            result = super()._compute_loss(model, inputs, return_outputs)
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

    def reference_logps(
        self, model: nn.Module, inputs: dict[str, Any], rows: list[int], answer_keys: list[str]
    ) -> Tensor:
        """The reference's log-probs (R,) of chosen and then rejected answers, cached if possible.

        Args:
            rows: the batch's row numbers.
            answer_keys: R keys of the answers.
        """
        cache = self.reference_cache
        keys = self.reference_keys(answer_keys)
        known_R = cache.get(keys) if cache is not None else None
        if known_R is not None:
            logps_R = to_device(known_R, inputs["input_ids"].device)
        if any_process_needs(known_R is None, self.accelerator.device):
            computed_R = self._compute_reference_logps(model, inputs, rows)
            if known_R is None:
                logps_R = cache.put(keys, computed_R) if cache is not None else computed_R
        return logps_R

    def reference_keys(self, answer_keys: list[str]) -> list[str]:
        """The keys by which the reference's log-probs of a batch's answers are kept."""
        # With `ld_alpha` TRL weighs an answer's tokens by whether the other answer is as long.
        return answer_keys if self.args.ld_alpha is None else pair_keys(answer_keys)

    def _compute_reference_logps(
        self, model: nn.Module, inputs: dict[str, Any], rows: list[int]
    ) -> Tensor:
        """One forward pass of the reference: log-probs (R,) of chosen and rejected answers."""
        has_own = self.ref_model is not None or isinstance(self.model, PeftModel)
        assert has_own or not self.state.global_step, "the policy is no longer the reference"
        with mock.patch("trl.trainer.dpo_trainer.use_adapter", adapters_off):
            logps_R = torch.cat(self.compute_ref_log_probs(self.ref_model or model, inputs))
        self._expect_finite(rows, logps_R)
        return logps_R

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
