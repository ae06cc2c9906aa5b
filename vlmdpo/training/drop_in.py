"""Which engine a `PairTrainer` in a TRL script uses, and what its rows share.

What the engine cannot do does not raise: TRL runs it as before, and one line says why.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, Image, IterableDataset

from vlmdpo import ui
from vlmdpo.data.groups import RowGroups, row_groups
from vlmdpo.engine.reference_cache import ReferenceLogps
from vlmdpo.engine.stock_collator import StockCollator
from vlmdpo.engine.trl_rows import is_rendered_as_asked, rendered
from vlmdpo.errors import ConfigError, nearest
from vlmdpo.models import families
from vlmdpo.training import engine_choice
from vlmdpo.training.related_rows import related_rows

if TYPE_CHECKING:
    from vlmdpo.training.protocols import DropInTrainer

ENGINES = ("auto", "rows", "stock")
_EXAMPLES = 4


def check_engine_name(engine: str) -> None:
    """Raise ConfigError for an unknown engine."""
    if engine not in ENGINES:
        raise ConfigError(
            f"engine={engine!r}: choose {', '.join(ENGINES)}.{nearest(engine, ENGINES)}"
        )


def choose(trainer: DropInTrainer, engine: str, data_collator: Any) -> tuple[str, str | None]:
    """(the engine to use, None or why it is not the one asked for), before any row is run.

    Args:
        data_collator: what the caller gave.
    """
    if engine == "stock":
        return engine, None
    reason = _why_stock(trainer, data_collator)
    if reason is not None:
        ui.warn(f"PairTrainer runs as TRL's DPOTrainer: {reason}")
        return "stock", reason
    chosen = "shared" if engine == "auto" else engine
    reasons = []
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            chosen, reason = engine_choice.choose_engine(
                chosen, model, router_loss=trainer.args.router_aux_loss_coef
            )
            reasons += [reason] if reason else []
    found = engine_choice.join_reasons(reasons)
    if found:
        _say_fallback(chosen, found)
    return chosen, found


def _why_stock(trainer: DropInTrainer, data_collator: Any) -> str | None:
    """What of the model, the data or the arguments only TRL's own rows can take; else None."""
    args = trainer.args
    peft_configs = getattr(trainer.model, "peft_config", {}).values()
    causes = {
        "the data has no column of images": not trainer._is_vision_dataset,
        "it was given a data_collator": data_collator is not None,
        "weights are split by FSDP or DeepSpeed, with which vlmdpo train has an engine": (
            trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        ),
        "tensors are split by a parallelism_config": (
            trainer.accelerator.parallelism_config is not None
        ),
        "its adapter adds virtual tokens": any(
            config.is_prompt_learning for config in peft_configs
        ),
        "use_liger_kernel replaces the model's layers": args.use_liger_kernel,
        "torch_compile compiles the model's own forward": args.torch_compile,
    }
    return next((cause for cause, holds in causes.items() if holds), None)


def _say_fallback(engine: str, reason: str) -> None:
    how = "each answer in a row of its own" if engine == "rows" else "as TRL's DPOTrainer"
    ui.warn(f"PairTrainer shares no prompts ({reason}); it runs {how}")


def verify(trainer: DropInTrainer) -> None:
    """Compare the engine with TRL's own rows on a few rows; use a simpler one until they agree.

    Raises MemoryBudgetError where memory runs out on them, and what TRL raises for rows that it
    cannot render.
    """
    rows = _examples(trainer)
    examples = [rendered(trainer.processing_class, row) for row in rows]
    if not is_rendered_as_asked(trainer.processing_class, rows[0]):
        ui.say(
            "prompts are rendered as TRL renders them; vlmdpo's commands render them differently: "
            "see Chat templates in docs/library.md"
        )
    reason = _tokenized_otherwise(trainer, examples)
    if reason is None:
        reasons = engine_choice.settle_engine(trainer, examples)
    else:
        reasons = [reason]
        trainer.use_engine("stock")
    if reasons:
        before = [trainer.fallback_reason] if trainer.fallback_reason else []
        trainer.fallback_reason = engine_choice.join_reasons([*before, *reasons])
        _say_fallback(trainer.engine, "; ".join(reasons))


def _examples(trainer: DropInTrainer) -> list[dict[str, Any]]:
    """Rows to check the engine with: some that share an image or a prompt, if there are any."""
    dataset = trainer.train_dataset
    count = min(_EXAMPLES, trainer.args.per_device_train_batch_size)
    if isinstance(dataset, IterableDataset):
        return list(itertools.islice(dataset, count))
    related = related_rows(dataset, count) if _why_not_comparable(dataset) is None else []
    return [dataset[row] for row in (related if len(related) > 1 else [0])]


def _tokenized_otherwise(trainer: DropInTrainer, examples: list[dict[str, Any]]) -> str | None:
    """Why TRL's collator and the engine's tokenize these rows differently; None if they do not."""
    if families.inserts_image_tokens(trainer.processing_class):  # TRL's cannot take such a model
        return None
    whole = dataclasses.replace(trainer.pair_collator, max_length=None)
    stock = StockCollator(trainer.processing_class)
    for example in examples:
        ours, theirs = whole.stock_rows([dict(example)]), stock([dict(example)])
        kept = [batch["input_ids"][batch["attention_mask"] == 1] for batch in (ours, theirs)]
        if not torch.equal(*kept):
            return "the processor and its tokenizer tokenize answers differently"
    return None


def groups(trainer: DropInTrainer, *, asked: bool) -> RowGroups | None:
    """What rows share, where grouping them by image saves something; else None.

    Args:
        asked: whether to say why not.
    """
    args, dataset = trainer.args, trainer.train_dataset
    reason = None
    if trainer.engine != "shared":
        reason = f"the engine is {trainer.engine}"
    elif args.train_batch_size == 1:
        reason = "per_device_train_batch_size is 1"
    elif args.train_sampling_strategy != "random":
        reason = f"train_sampling_strategy is {args.train_sampling_strategy}"
    else:
        reason = _why_not_comparable(dataset)
    if reason is None:
        found = row_groups(dataset)
        if found.is_shared:
            ui.say(
                f"rows of one image train together: {found.num_images:,} images and "
                f"{found.num_prompts:,} prompts in {len(dataset):,} rows; group_by_image=False "
                "leaves TRL's order"
            )
            return found
        reason = "no two rows have an image or a prompt in common"
    if asked:
        ui.warn(f"group_by_image does nothing: {reason}")
    return None


def _why_not_comparable(dataset: Any) -> str | None:
    """Why rows cannot be compared as they are stored; None if they can."""
    if not isinstance(dataset, Dataset):
        return "a streamed dataset is read once, in its own order"
    if dataset.format["type"] == "custom":
        return "the dataset's rows are made by a transform"
    if "prompt" not in dataset.column_names:
        return "the dataset has no column `prompt`"
    for name in {"images", "image"} & set(dataset.column_names):
        feature = dataset.features[name]
        feature = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
        if not isinstance(feature, Image):
            return f"the dataset's column `{name}` does not hold images, but {feature}"
    return None


def reference_cache(trainer: DropInTrainer) -> ReferenceLogps | None:
    """A cache in memory; None with the stock engine, whose batches have no keys.

    Raises ConfigError if the reference changes during training.
    """
    if trainer.args.sync_ref_model:
        raise ConfigError(
            "cache_reference: sync_ref_model changes the reference during training; leave out one "
            "of them"
        )
    if trainer.engine == "stock":
        ui.warn("cache_reference does nothing: PairTrainer runs as TRL's DPOTrainer")
        return None
    return ReferenceLogps()
