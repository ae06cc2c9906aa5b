"""The two caches beside the prepared data: reference log-probs, and image features."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlmdpo import ui
from vlmdpo.data.groups import IMAGE_DIGEST
from vlmdpo.errors import DataError
from vlmdpo.training.setup import TrainingSetup

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import DPOConfig

    from vlmdpo.engine.reference_cache import ReferenceCache
    from vlmdpo.models.protocols import Processor, VisionLanguageModel


# Counts what made log-probs of earlier versions wrong: 2, that FSDP2 rounded them to whole nats.
_FORMAT = 2


class ReferenceOptions(Protocol):
    """The options that decide on a reference cache, of several groups."""

    @property
    def reference_cache(self) -> bool: ...
    @property
    def lora(self) -> bool: ...


def open_reference_cache(
    options: ReferenceOptions,
    args: DPOConfig,
    data: Path,
    model: VisionLanguageModel,
    processor: Processor,
    engine: str,
) -> ReferenceCache | None:
    """The cache for this run, with what earlier runs computed with the same reference.

    None if it is switched off or cannot be used. Its key holds all that log-probs depend on beside
    the answer, its prompt and its images, by which each one is found.
    """
    from vlmdpo.distributed.processes import launched_strategy
    from vlmdpo.engine import reference_cache
    from vlmdpo.models import digest
    from vlmdpo.models.attention import describe_attention

    if not options.reference_cache:
        return None
    if args.sync_ref_model:
        ui.warn("no reference cache: sync_ref_model changes the reference during training")
        return None
    if not options.lora and launched_strategy():
        ui.warn(
            "no reference cache: full fine-tuning under FSDP or DeepSpeed keeps a reference model"
        )
        return None
    facts = {
        "format": _FORMAT,
        "weights": _weights_digest(model, args),
        **_adapter_facts(model),
        "processor": digest.processor_digest(processor),
        "computed": [
            *(str(model.dtype), args.bf16, args.fp16),
            *(engine, args.max_length, args.ld_alpha, describe_attention(model)),
        ],
        "transformers": version("transformers"),
    }
    cache = reference_cache.ReferenceCache(data, reference_cache.cache_key(facts))
    if cache.num_known:
        ui.say(
            f"reference log-probs: those of {ui.count(cache.num_known, 'answer')} found in "
            f"{cache.path}"
        )
    return cache


def _adapter_facts(model: VisionLanguageModel) -> dict[str, Any]:
    """How a reference's adapter computes from its weights, if it has one: scale, kind, ranks."""
    if not hasattr(model, "peft_config"):
        return {}
    settings = model.peft_config["default"].to_dict()
    says_nothing = {"base_model_name_or_path", "revision", "inference_mode", "lora_dropout"}
    return {"adapter": {n: str(v) for n, v in settings.items() if n not in says_nothing}}


def _weights_digest(model: VisionLanguageModel, args: DPOConfig) -> str:
    """The digest of the weights, which the first process computes for all: each has the same."""
    from vlmdpo.models import digest

    found = [digest.weights_digest(model) if args.process_index == 0 else ""]
    if args.world_size > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(found)
    return found[0]


def attach_feature_cache(setup: TrainingSetup) -> None:
    """Let the trainer keep image features on disk, and print how much they take.

    Raises DataError if the disk has too little space.
    """
    from vlmdpo.engine import feature_cache, reference_cache
    from vlmdpo.engine.batch_context import BATCH_CONTEXT
    from vlmdpo.models import digest
    from vlmdpo.models.attention import describe_attention
    from vlmdpo.models.families import vision_parameters
    from vlmdpo.training import doctor

    trainer, data = setup.trainer, setup.data
    shared = trainer.shared_forwards[0]
    tower = vision_parameters(shared.backbone)
    facts = {
        "tower": digest.tensors_digest(("", tensor) for tensor in tower),
        "processor": digest.processor_digest(setup.processor),
        "computed": [
            *(str(trainer.model.dtype), trainer.args.bf16, trainer.args.fp16),
            describe_attention(trainer.accelerator.unwrap_model(trainer.model)),
        ],
    }
    cache = feature_cache.FeatureCache(data, reference_cache.cache_key(facts))
    context = shared.new_batch()
    batch = trainer.data_collator([dict(example) for example in setup.examples()])
    doctor.token_logps(trainer, {**batch, BATCH_CONTEXT: context})
    # Rows with the same images have their features once.
    bytes_per_row = context.image_feature_bytes / max(1, sum(map(bool, batch["image_keys"])))
    known, free = cache.num_known, shutil.disk_usage(data).free
    wanted = sum(map(_num_distinct_images, trainer.datasets))
    # Which of them are known only their pixels say.
    needed = bytes_per_row * max(0, wanted - known)
    ui.say(
        f"image features: {known:,} found; up to {wanted:,} are wanted, which take about "
        f"{ui.human_bytes(bytes_per_row * wanted)} in {cache.path}"
    )
    if needed > free:  # even if all that are known are wanted
        raise DataError(
            f"--feature-cache: about {ui.human_bytes(needed)} needed, {ui.human_bytes(free)} free "
            f"at '{data}'"
        )
    trainer.feature_cache = cache
    trainer.use_engine(trainer.engine)


def _num_distinct_images(rows: Dataset) -> int:
    """How many rows have images that no row before them has; all, if `prepare` did not note it."""
    if IMAGE_DIGEST not in rows.column_names:
        return len(rows)
    return len(set(rows[IMAGE_DIGEST]) - {""})  # "" for a row without images
