"""The DPOTrainer subclass: TRL's trainer, loss and metrics, fed by the pair engine.

Nothing of the loss is written here. The batch is shaped so that TRL's code reads it as its own.
"""

from __future__ import annotations

import contextvars
import copy
import functools
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object
from peft import LoraConfig, PeftModel
from torch.utils.data import ConcatDataset, DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from vlmdpo import ui
from vlmdpo.distributed.processes import launched_strategy
from vlmdpo.engine.batch_context import BATCH_CONTEXT
from vlmdpo.engine.collate import PairCollator, row_ids
from vlmdpo.engine.feature_cache import FeatureCache
from vlmdpo.engine.forward import SharedForward
from vlmdpo.engine.reference_cache import ReferenceCache
from vlmdpo.engine.stock_collator import StockCollator
from vlmdpo.errors import ConfigError
from vlmdpo.training import checkpoints, mdpo
from vlmdpo.training.auto_batch import LOSS_WEIGHT, AutoBatch, keep_uncollated
from vlmdpo.training.length_grouping import LengthGroupedSampler
from vlmdpo.training.mdpo import MdpoCollator
from vlmdpo.training.monitor import TrainingMonitor
from vlmdpo.training.sharding import checkpointable_layers

# transformers asks `_get_output_dir` where a checkpoint goes, and passes nothing of ours to it.
# Set while a checkpoint is being written.
_unfinished_checkpoint: contextvars.ContextVar[Path | None] = contextvars.ContextVar(
    "vlmdpo_unfinished_checkpoint", default=None
)


class NonFiniteLoss(Exception):
    """The loss of a batch is no finite number; `rows` are its rows, `step` the optimizer step it
    belongs to, or after which it was `evaluated`.
    """

    def __init__(self, rows: list[int], step: int, *, evaluated: bool = False) -> None:
        super().__init__(f"the loss of step {step} is no number (rows {rows})")
        self.rows, self.step, self.evaluated = rows, step, evaluated


class PairTrainer(DPOTrainer):
    """TRL's `DPOTrainer` on prepared pairs, with one of three engines.

    Args:
        engine: "shared" runs image and prompt once for both answers; "rows" gives each answer its
            own row but encodes each image once, for models that cannot share; "stock" is TRL as it
            is.
        references: reference log-probs by row; needs the column `row` in the dataset. None: TRL's
            own way, every batch anew.
        conditional: above 0 batches are mDPO's (see `mdpo`), and the prepared dataset has so many
            rows.
        others: what `DPOTrainer` takes.
    """

    def __init__(
        self,
        *,
        engine: str,
        processing_class: Any,
        args: DPOConfig,
        references: ReferenceCache | None = None,
        conditional: int = 0,
        **others: Any,
    ) -> None:
        # TRL wants a collator at birth; `use_engine` gives it the engine's own.
        collator: Any = StockCollator(processing_class, max_length=args.max_length)
        super().__init__(
            processing_class=processing_class, args=args, data_collator=collator, **others
        )
        self.references = references
        self.conditional = conditional
        self.features: FeatureCache | None = None
        self.lengths: list[int] | None = (
            None  # tokens of each row's longer sequence, where rows are grouped by it
        )
        self.auto_batch: AutoBatch | None = None
        self.checkpointed_layers: int | None = (
            None  # None: all (ours: but the last), where checkpointing is on
        )
        self.shared_forwards: list[SharedForward] = []
        self.has_real_values = True  # a simulated step has none, and its losses mean nothing
        if references is not None and not isinstance(self.model, PeftModel):
            self.ref_model = (
                None  # it was a stand-in; the policy itself fills the cache before it trains
            )
        self.use_engine(engine)

    def create_accelerator_and_postprocess(self) -> None:
        """TRL's; and where FSDP is asked for, FSDP: accelerate would quietly run DDP on CPUs, where
        torch can shard too.
        """
        self.is_fsdp_enabled: bool
        super().create_accelerator_and_postprocess()
        if launched_strategy() == "fsdp2" and not self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
            # Both: accelerate copies the one onto the other whenever it likes.
            self.accelerator.state.distributed_type = PartialState().distributed_type = (
                DistributedType.FSDP
            )
            self.is_fsdp_enabled = True

    def use_engine(self, engine: str) -> None:
        """Let policy and, where there is one, reference model read this engine's batches from now
        on.
        """
        for shared in self.shared_forwards:
            shared.remove()
        self.engine, self.shared_forwards = engine, []
        processor, limit = self.processing_class, self.args.max_length
        collator: Any = PairCollator(processor, max_length=limit, share=engine == "shared")
        self.pair_collator = (
            StockCollator(processor, max_length=limit) if engine == "stock" else collator
        )
        if self.conditional:
            if engine != "shared":
                raise ConfigError(
                    "--loss mdpo needs the shared engine, which this model or --engine cannot have"
                )
            collator = MdpoCollator(
                processor, max_length=limit, rows=self.conditional, seed=self.args.seed
            )
        self.data_collator = self.pair_collator if engine == "stock" else collator
        if engine == "stock":
            return
        models = [self.model] + ([self.ref_model] if self.ref_model is not None else [])
        # The reference model of full fine-tuning has a tower of its own, which is not the policy's.
        kept = [self.features] + [None] * (len(models) - 1)
        share = engine == "shared"
        self.shared_forwards = [
            SharedForward(
                m,
                share=share,
                features=features,
                gradient_in_every_batch=self.accelerator.num_processes > 1,
            )
            for m, features in zip(models, kept, strict=True)
        ]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = vars(self)["_signature_columns"]
        self._signature_columns = [*(name for name in columns if name != "row"), "row"]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        batch = (
            self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size
        )
        return LengthGroupedSampler(self.lengths, batch, self.args.seed)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """transformers'; but a run that is resumed where it had ended takes no further step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        folder = _unfinished_checkpoint.get()
        return str(folder) if folder is not None else str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """TRL's, in a hidden folder that gets its name once all is written. Raises DataError for a
        full disk.
        """
        folder = Path(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        if (folder / checkpoints.checkpoint_name(self.state.global_step)).is_dir():
            return  # of this very step: the run stopped where it had begun
        with checkpoints.atomic_checkpoint(
            folder, self.state.global_step, self.args.save_total_limit, self.accelerator
        ) as partial:
            token = _unfinished_checkpoint.set(partial)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                _unfinished_checkpoint.reset(token)

    def enable_auto_batch(self) -> None:
        """From now on a batch that does not fit memory is computed in parts; see `autobatch`."""
        self.auto_batch = AutoBatch(self, super().training_step)

    def get_train_dataloader(self) -> Any:
        if self.auto_batch is None:
            return super().get_train_dataloader()
        # transformers builds the loader with `self.data_collator`, which evaluation needs as it is:
        # so the loader is built by a shallow copy that differs in its collator only.
        builder = copy.copy(self)
        builder.data_collator = keep_uncollated
        return super(PairTrainer, builder).get_train_dataloader()

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Any:
        if self.auto_batch is None:
            return super().training_step(model, inputs, num_items_in_batch)
        return self.auto_batch.step(model, inputs["examples"], num_items_in_batch)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        weight = inputs.pop(LOSS_WEIGHT, 1.0)  # below 1 for a part of a batch; see `AutoBatch`
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss if weight == 1 else loss * weight

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        inputs = dict(inputs)
        rows = inputs.pop("row", None)
        if self.shared_forwards:
            # TRL passes every input that it does not know on to the model.
            inputs[BATCH_CONTEXT] = self.shared_forwards[0].new_batch(
                rows, row_ids(inputs) if rows is not None else ()
            )
        return self._with_references(model, inputs, rows, return_outputs)

    def _with_references(
        self, model: Any, inputs: dict[str, Any], rows: Any, return_outputs: bool
    ) -> Any:
        """TRL's loss, with the rows' reference log-probs from the cache; those not in it yet are
        computed first.
        """
        if self.references is not None or self.conditional:
            known = self._reference(model, inputs, rows)
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = (
                logps.to(rows.device) for logps in known
            )
            self.precompute_ref_logps = True
        # Each time, because TRL turns checkpointing on again after every reference forward, and all
        # that goes with it.
        if self.shared_forwards and not (self.args.gradient_checkpointing_kwargs or {}).get(
            "use_reentrant"
        ):
            self.shared_forwards[0].remove_input_gradient_hooks()
        layers = checkpointable_layers(self.model)
        wanted = self.checkpointed_layers
        if wanted is None and self.engine == "shared":
            # The last layer's activations are needed first: to drop them is to make them again at
            # once, for nothing.
            wanted = max(1, len(layers) - 1)
        for layer in layers[wanted:] if wanted is not None else ():
            layer.gradient_checkpointing = False
        found = self._loss_of(model, inputs, return_outputs)
        if self.has_real_values and not bool((found[0] if return_outputs else found).isfinite()):
            raise self._no_number(rows)
        return found

    def _no_number(self, rows: Any) -> NonFiniteLoss:
        numbers = [] if rows is None else rows.tolist()
        evaluated = (
            bool(numbers)
            and self.eval_dataset is not None
            and numbers[0] in set(self.eval_dataset["row"])
        )
        return NonFiniteLoss(
            numbers, self.state.global_step + (0 if evaluated else 1), evaluated=evaluated
        )

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's; but each row of the test split counts alike, where TRL lets each batch, however
        small the last one is.
        """
        logged = self._metrics["eval"]
        before = {name: len(values) for name, values in logged.items()}
        found = super().prediction_step(model, inputs, *args, **kwargs)
        logged["loss"].append(self.accelerator.gather(found[0].detach()).mean().item())
        for name, values in logged.items():
            new = values[before.get(name, 0) :]
            values[before.get(name, 0) :] = [
                value for value in new for _ in range(len(inputs["row"]))
            ]
        return found

    def _loss_of(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if not self.conditional:
            return super()._compute_loss(model, inputs, return_outputs)
        said: list[Any] = []
        listening = model.register_forward_hook(
            lambda module, given, output: said.append(output.log_probs.detach().sum(1))
        )
        try:
            loss = super()._compute_loss(model, inputs, return_outputs)
        finally:
            listening.remove()
        self._log_conditional(said[0], (inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]))
        return loss

    def _reference(self, model: Any, inputs: dict[str, Any], rows: Any) -> tuple[Any, Any]:
        """The reference's log-probs of a batch, chosen and rejected, kept where there is a cache."""
        known = self.references.get(rows) if self.references is not None else None
        if known is None:
            assert (
                self.ref_model is not None
                or isinstance(self.model, PeftModel)
                or not self.state.global_step
            ), "the policy is no reference any more"
            known = self.compute_ref_log_probs(self.ref_model or model, inputs)
            known = mdpo.by_answer(*known) if self.conditional else known
            if self.has_real_values and not all(bool(logps.isfinite().all()) for logps in known):
                raise self._no_number(rows)
            if self.references is not None:
                self.references.put(rows, *known)
        return mdpo.by_term(*known) if self.conditional else known

    def _log_conditional(self, policy: Any, reference: tuple[Any, Any]) -> None:
        """Metrics of the rows' own answers in place of TRL's, which would mix the three terms."""
        logged = self._metrics["train" if self.model.training else "eval"]
        for name, values in mdpo.metrics(policy, reference, self.beta).items():
            mean = self.accelerator.gather(values).mean().item()
            if name in logged and not name.startswith(("rewards/conditional", "rewards/anchored")):
                logged[name][-1] = mean
            else:
                logged[name].append(mean)

    @property
    def datasets(self) -> list[Any]:
        """The rows that train, and those that are evaluated on where there are any."""
        return [part for part in (self.train_dataset, self.eval_dataset) if part is not None]

    def compute_references(self) -> None:
        """Fill the cache over the whole dataset now, in batches larger than training's: nothing is
        kept for a backward.

        For runs whose reference is a model of its own: afterwards it is needed no more.
        """
        assert self.references is not None
        loader = self.accelerator.prepare(
            DataLoader(
                ConcatDataset(self.datasets),
                batch_size=4 * self.args.per_device_train_batch_size,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
            )
        )
        model = self.ref_model or self.model
        with ui.progress("reference", len(loader)) as bar:
            for batch in loader:
                inputs = dict(self._prepare_inputs(batch))
                rows = inputs.pop("row")
                self._reference(model, inputs, rows)
                bar.advance()
        self.save_references()

    def save_all(self, model: Any) -> None:
        """A checkpoint of the last whole step, and the reference log-probs, now."""
        self.save_references()
        self._save_checkpoint(model, None)

    def save_references(self) -> None:
        """Bring together what the processes found, and write it. Every process must call this."""
        if self.references is not None:
            many = self.accelerator.num_processes > 1
            others = gather_object(self.references.fresh()) if many else []
            self.references.save(others, write=self.accelerator.is_main_process)


class _Keeper(TrainerCallback):
    """Writes reference log-probs at every checkpoint, after every epoch, and at the end."""

    trainer: PairTrainer

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.save_references()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.save_references()


def make_trainer(
    *,
    engine: str,
    model: Any,
    reference: Any,
    processor: Any,
    dataset: Any,
    held_out: Any = None,
    args: DPOConfig,
    lora: LoraConfig | None,
    watch: TrainingMonitor | None = None,
    references: ReferenceCache | None = None,
    conditional: int = 0,
) -> PairTrainer:
    """A `PairTrainer` with our progress instead of TRL's bars. Raises ConfigError for bad targets.

    Args:
        held_out: rows to evaluate on, with a column `row`; None for none.
    """
    if "row" not in dataset.column_names:
        dataset = dataset.add_column("row", range(len(dataset)))
    keeper = _Keeper()
    if references is not None and lora is None:
        # Without an adapter TRL insists on a reference model. The cache makes one needless: a
        # second handle on the same weights, which owns no memory, satisfies it until `PairTrainer`
        # drops it.
        reference = copy.copy(model)
    try:
        trainer = PairTrainer(
            engine=engine,
            references=references,
            conditional=conditional,
            model=model,
            ref_model=reference,
            args=args,
            train_dataset=dataset,
            eval_dataset=held_out,
            processing_class=processor,
            peft_config=lora,
            callbacks=[keeper] if watch is None else [keeper, watch],
        )
    except ValueError as problem:
        if "Target modules" not in str(problem):
            raise
        raise ConfigError(f"--lora-target-modules: {str(problem).splitlines()[0]}") from problem
    keeper.trainer = trainer
    if watch is not None:
        watch.save_now = functools.partial(trainer.save_all, trainer.model)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer
