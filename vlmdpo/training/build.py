"""From options to a `TrainingSetup`: data, model, engine, caches and trainer, checked and wired up.

Imports torch only inside functions, so that importing the command above stays fast.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmdpo import ui
from vlmdpo.config import DataOptions, LoraOptions, RunOptions, SpeedOptions, TrainConfig
from vlmdpo.config.common import RuntimeOptions
from vlmdpo.data import store
from vlmdpo.errors import ConfigError, DataError
from vlmdpo.models.configured import configured_model, configured_processor
from vlmdpo.training.data_check import check_prepared_for
from vlmdpo.training.lineage import lineage
from vlmdpo.training.setup import TrainingSetup

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import DPOConfig

    from vlmdpo.models.protocols import Processor, VisionLanguageModel
    from vlmdpo.training.monitor import TrainingMonitor


def build_setup(
    config: TrainConfig, args: DPOConfig, data: Path, monitor: TrainingMonitor
) -> TrainingSetup:
    """Load everything, choose the engine, and check it.

    Args:
        args: TRL's arguments, made from `config`.
        data: the prepared folder.

    Raises ConfigError, DataError, ModelError.
    """
    from vlmdpo.distributed.processes import launched_strategy
    from vlmdpo.training import caches, continued, engine_choice
    from vlmdpo.training.arguments import enable_evaluation, lora_config, say_what_lora_leaves
    from vlmdpo.training.keep_best import KeepBest
    from vlmdpo.training.make_trainer import make_trainer
    from vlmdpo.training.sharding import check_sharding

    dataset = store.load(data)
    dataset = dataset.add_column("row", range(len(dataset)))
    check_sharding(launched_strategy(), config, dataset)
    eval_dataset = _load_eval_dataset(config, data, len(dataset))
    manifest = store.read_manifest(data) or {}
    date = manifest.get("prompt_date")
    processor = configured_processor(config, adapter=config.adapter, date=date)
    check_prepared_for(data, manifest, processor, config)
    dataset, over_length = _within_max_length(config, dataset, processor, data)
    if eval_dataset is not None:
        eval_dataset, _ = _within_max_length(config, eval_dataset, processor, data)
        enable_evaluation(args, config.eval_steps)
    loaded_as = dataclasses.replace(config, dtype=config.weights_dtype)
    model = _load_policy(loaded_as, config.quantization)
    freeze_parts(config, model)
    engine, fallback_reason = engine_choice.choose_engine(
        config.engine, model, router_loss=args.router_aux_loss_coef
    )
    if config.adapter is not None:
        model = continued.with_adapter(config, config.adapter, model)
    reference_cache = caches.open_reference_cache(config, args, data, model, processor, engine)
    adapter = lora_config(config, model) if config.adapter is None else None
    say_what_lora_leaves(adapter, model)
    # An adapter's reference is the same weights with the adapter off, or with a copy of the one
    # that training goes on from; a cache's, what the policy said before it trained.
    needs_reference_model = not config.lora and reference_cache is None
    trainer = make_trainer(
        engine=engine,
        model=model,
        reference_model=configured_model(loaded_as) if needs_reference_model else None,
        processor=processor,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        args=args,
        lora_config=adapter,
        monitor=monitor,
        reference_cache=reference_cache,
        mdpo=config.losses().is_mdpo,
    )
    setup = TrainingSetup(trainer, processor, dataset, monitor, fallback_reason, over_length, data)
    setup.lineage = lineage(config.adapter)
    if config.keep_best:
        keep_best = KeepBest(Path(args.output_dir), config.best_by, config.early_stopping, monitor)
        setup.keep_best = keep_best
        trainer.best_step = lambda: (keep_best.best() or {}).get("step")
        trainer.add_callback(keep_best)
    _finish_setup(setup, config, config.per_device_train_batch_size)
    return setup


def _finish_setup(setup: TrainingSetup, options: SpeedOptions, batch_size: int) -> None:
    """What needs the trainer: the engine's self-check, and what is switched on in the trainer."""
    from vlmdpo.engine.lengths import row_lengths
    from vlmdpo.training import activation_checkpointing, caches, engine_choice, grouping, preflight
    from vlmdpo.training.sharding import configure_fsdp

    trainer = setup.trainer
    if trainer.is_fsdp_enabled:
        configure_fsdp(trainer)
    if setup.is_sharded:  # no process could run its part of the model alone
        trainer.add_callback(preflight.ShardedPreflight(setup))
    else:
        engine_choice.verify_engine(setup)
    group_by_length = options.group_by_length
    if group_by_length or (group_by_length is None and trainer.engine == "rows"):
        manifest = store.read_manifest(setup.data)
        lengths = row_lengths(setup.processor, setup.dataset, manifest)
        trainer.row_lengths = [length.longest for length in lengths]
    grouping.group_by_image(setup, options)
    if options.feature_cache and trainer.engine == "stock":
        raise ConfigError(f"--feature-cache: image features stay TRL's ({setup.fallback_reason})")
    if options.feature_cache:
        caches.attach_feature_cache(setup)
    if options.auto_batch_size:
        trainer.enable_auto_batch()
    if options.gradient_checkpointing:
        examples = setup.examples(batch_size)
        activation_checkpointing.apply(trainer, options.checkpointing, examples)


def _load_policy(options: RuntimeOptions, quantization: str) -> VisionLanguageModel:
    from vlmdpo.config.common import SHARDED_STRATEGIES
    from vlmdpo.distributed.processes import launched_strategy
    from vlmdpo.models.load import load_model

    is_sharded = launched_strategy() in SHARDED_STRATEGIES
    model: VisionLanguageModel = load_model(
        options.model,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        dtype=options.dtype,
        device="cpu" if is_sharded else options.device,  # before it is sharded it may fit no GPU
        attention=options.attn_implementation,
        quantization=quantization,
    )
    return model


def check_eval_steps(options: RunOptions, *, has_test_split: bool) -> None:
    """Raise ConfigError for options that need a test split, where the data has none."""
    asked = [
        flag
        for flag, is_given in (
            ("--eval-steps", options.eval_steps),
            ("--keep-best", options.keep_best),
        )
        if is_given and not has_test_split
    ]
    if asked:
        raise ConfigError(
            f"{asked[0]}: this data has no test split; make one with vlmdpo prepare --test-size "
            "0.05"
        )


def _load_eval_dataset(options: RunOptions, data: Path, train_rows: int) -> Dataset | None:
    """The test split if it is evaluated on.

    Its rows are numbered after the `train_rows` that train. Raises ConfigError for `--eval-steps`
    without a test split.
    """
    has_test_split = store.has_test_split(data)
    check_eval_steps(options, has_test_split=has_test_split)
    if not has_test_split:
        return None
    test = store.load(data, "test")
    if options.eval_steps == 0:
        return None
    return test.add_column("row", range(train_rows, train_rows + len(test)))


def freeze_parts(options: LoraOptions, model: VisionLanguageModel) -> None:
    """Exclude the parts of `--freeze` from training. Raises ConfigError if nothing is left."""
    from vlmdpo.models.families import parameters_by_part

    frozen = options.frozen_parts()
    for part, _, parameter in parameters_by_part(model) if frozen else ():
        parameter.requires_grad_(part not in frozen)
    if not options.lora and not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"--freeze {options.freeze} leaves nothing to train")


def _within_max_length(
    options: DataOptions, dataset: Dataset, processor: Processor, data: Path
) -> tuple[Dataset, list[dict[str, Any]]]:
    """The rows that fit `--max-length` or can be trimmed to it, and a record of each other one.

    Raises DataError if no row is left.
    """
    from vlmdpo.engine.lengths import apply_max_length, row_lengths

    limit = options.max_length
    if limit is None:
        return dataset, []
    lengths = row_lengths(processor, dataset, store.read_manifest(data))
    kept, records = apply_max_length(lengths, limit, options.over_length)
    if not kept:
        shortest = min(
            record["prompt"] + max(record["chosen"], record["rejected"]) for record in records
        )
        raise DataError(
            f"--max-length {limit}: every row is longer; the shortest has {shortest} tokens with "
            "its images"
        )
    if records:
        counts = Counter(record["done"] for record in records)
        done = " and ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))
        rows = ", ".join(str(record["row"]) for record in records[:5])
        more = " ..." if len(records) > 5 else ""
        ui.warn(
            f"{len(records):,} of {ui.count(len(dataset), 'row')} over --max-length {limit}: "
            f"{done} "
            f"(rows {rows}{more}, counted from 0)"
        )
    return dataset.select(kept), records
