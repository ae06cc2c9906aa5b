"""TRL's trainer for preferences, fed by the pair engine: one import replaced in a TRL script.

Nothing of the loss is written here: the batch is shaped so that TRL's code reads it as its own.
Every method of TRL and transformers that is overridden is listed in `trl_contract`, with why.

Shapes: B rows of a batch; P pairs that TRL sees in it, B or with mDPO 3B; R = 2P rows of its
loss, one for each answer, chosen ones first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from peft import PeftModel
from trl import DPOConfig, DPOTrainer

from vlmdpo import ui
from vlmdpo.engine.batch import image_token_ids
from vlmdpo.engine.batch_context import BATCH_CONTEXT
from vlmdpo.engine.collate import PairCollator
from vlmdpo.engine.content_keys import pair_keys
from vlmdpo.engine.devices import to_device
from vlmdpo.engine.feature_cache import FeatureCache
from vlmdpo.engine.forward import SharedForward
from vlmdpo.engine.reference_cache import ReferenceLogps
from vlmdpo.engine.trl_rows import TrlRowsCollator
from vlmdpo.models.adapters import use_adapter
from vlmdpo.models.families import has_bidirectional_prompt, unwrap_peft
from vlmdpo.models.inputs import in_dtype, take_host_only
from vlmdpo.training import drop_in
from vlmdpo.training.row_order import grouped_sampler
from vlmdpo.training.sharding import any_process_needs, checkpointable_layers

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
    from peft import PeftConfig
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import DataLoader, Sampler
    from transformers import (
        BitsAndBytesConfig,
        DataCollator,
        EvalPrediction,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )

    from vlmdpo.data.groups import RowGroups


class PairTrainer(DPOTrainer):
    """TRL's `DPOTrainer`, with rows that share an image or a prompt computed as one tree.

    Takes what `trl.DPOTrainer` takes, and gives its loss, metrics and gradients. What the engine
    cannot do runs as TRL runs it, and a line on stderr says why.

    Args:
        model: the model, a PEFT model, or a name or folder that TRL loads.
        ref_model: the reference; None for the model as it is now.
        args: TRL's arguments; None for its defaults.
        data_collator: one of your own runs as in TRL, without the engine.
        train_dataset: of TRL's vision-preference format. A text-only dataset runs as in TRL.
        eval_dataset: likewise, or several by name.
        processing_class: the model's processor; None to load it by the model's name.
        compute_metrics: given logits, so that evaluation then runs TRL's own rows.
        callbacks, optimizers, quantization_config, peft_config: as in TRL.
        engine: "auto" runs what rows share once, and falls back where a model cannot; "rows" gives
            each answer a row of its own but encodes an image once; "stock" is TRL unchanged.
        group_by_image: whether rows of one image train in one batch; None where any two rows have
            an image or a prompt in common, False for TRL's own order.
        cache_reference: whether to keep the reference's log-probs in memory, by image, prompt and
            answer, so that an answer is scored once in a run.
        self_check: whether to compare the engine with TRL's rows on a few rows before it is used.

    Attributes:
        engine: the one in use: "shared", "rows" or "stock".
        fallback_reason: why it is not the one that was asked for, or None.
        pair_collator: makes a batch of rendered rows for the engine.
        feature_cache: image features on disk; takes effect with the next `use_engine`.
        row_lengths, row_groups: what rows are grouped by: their tokens, and what they share.
        checkpointed_layers: how many language layers recompute; None for all (shared: all but one).

    Raises:
        ConfigError: an unknown engine, or `cache_reference` with a reference that changes.
        Whatever TRL raises for its own arguments.
    """

    is_mdpo = False
    engine: str
    fallback_reason: str | None
    pair_collator: Any
    data_collator: Any
    reference_cache: ReferenceLogps | None
    feature_cache: FeatureCache | None
    row_lengths: list[int] | None
    row_groups: RowGroups | None
    checkpointed_layers: int | None
    shared_forwards: list[SharedForward]
    _is_unchecked: bool
    _group_by_image: bool | None

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        *,
        engine: str = "auto",
        group_by_image: bool | None = None,
        cache_reference: bool = False,
        self_check: bool = True,
    ) -> None:
        drop_in.check_engine_name(engine)
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self._init_engine_state()
        if self.args.process_index:
            ui.mute()
        self._stock_collator = self.data_collator
        self._group_by_image = group_by_image
        engine, self.fallback_reason = drop_in.choose(self, engine, data_collator)
        self.use_engine(engine)
        self._is_unchecked = self_check and engine != "stock"
        if cache_reference:
            self.reference_cache = drop_in.reference_cache(self)

    def _init_engine_state(self) -> None:
        self.engine, self.fallback_reason = "stock", None
        self.reference_cache = self.feature_cache = None
        self.row_lengths = self.row_groups = self.checkpointed_layers = None
        self.shared_forwards = []
        self._is_unchecked = self._group_by_image = False

    def use_engine(self, engine: str) -> None:
        """Switch policy and reference model to this engine's batches from now on."""
        for shared in self.shared_forwards:
            shared.remove()
        self.engine, self.shared_forwards = engine, []
        self._use_collators(engine)
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

    def _use_collators(self, engine: str) -> None:
        """Set `pair_collator` and `data_collator` to the engine's."""
        self.data_collator = self._stock_collator
        if engine != "stock":
            self.pair_collator = self._new_pair_collator(engine)
            self.data_collator = TrlRowsCollator(self.pair_collator, self._stock_collator)

    def _new_pair_collator(self, engine: str) -> PairCollator:
        return PairCollator(
            self.processing_class,
            max_length=self.args.max_length,
            share=engine == "shared",
            share_beginnings=not has_bidirectional_prompt(unwrap_peft(self.model).base_model),
        )

    def _before_use(self) -> None:
        """Check the engine, before it first trains or evaluates."""
        if self._is_unchecked:
            self._is_unchecked = False
            drop_in.verify(self)

    # The first chance to check the engine on the model as it trains, and the last to change it:
    # `train` makes the loader with the engine's collator.
    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._before_use()
        if self._group_by_image is not False and self.row_groups is None:
            self.row_groups = drop_in.groups(self, asked=bool(self._group_by_image))
        return super().train(*args, **kwargs)

    # A trainer may only evaluate.
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self._before_use()
        return super().evaluate(*args, **kwargs)

    # What is predicted, and given to `compute_metrics`, are logits of whole rows.
    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        with self._stock_rows() if self.compute_metrics else contextlib.nullcontext():
            loader: DataLoader[Any] = super().get_eval_dataloader(*args, **kwargs)
        return loader

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        with self._stock_rows():
            loader: DataLoader[Any] = super().get_test_dataloader(*args, **kwargs)
        return loader

    @contextlib.contextmanager
    def _stock_rows(self) -> Iterator[None]:
        """Inside, loaders are made with TRL's own collator."""
        own, self.data_collator = self.data_collator, self._stock_collator
        try:
            yield
        finally:
            self.data_collator = own

    # The logged count is that of the rows that TRL would run.
    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        if "forest" in inputs:
            inputs = {**inputs, "input_ids": inputs["attention_mask"]}
        return int(super().floating_point_ops(inputs))

    # transformers' grouping by length is not the same in all processes and after a resume.
    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        sampler = grouped_sampler(self.row_groups, self.row_lengths, self.args)
        return sampler if sampler is not None else super()._get_train_sampler(train_dataset)

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
            # TRL takes them from the batch, if it holds them.
            self.precompute_ref_logps = bool(answer_keys)
            if answer_keys:
                logps_R = self.reference_logps(model, inputs, rows, answer_keys)
                inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = logps_R.chunk(2)
        self._set_checkpointing()
        return self._loss_of_trl(model, inputs, return_outputs)

    def _loss_of_trl(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        return super()._compute_loss(model, inputs, return_outputs)

    def _set_checkpointing(self) -> None:
        """Switch off recomputation where it saves nothing, or where `checkpointed_layers` says so.

        For every batch, because TRL switches all of it on again after each reference forward.
        """
        if self.engine == "stock" and self.checkpointed_layers is None:
            return
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
        # TRL asks for no adapter or, if the PEFT model came with one, for its copy of that.
        with mock.patch("trl.trainer.dpo_trainer.use_adapter", use_adapter):
            return torch.cat(self.compute_ref_log_probs(self.ref_model or model, inputs))
