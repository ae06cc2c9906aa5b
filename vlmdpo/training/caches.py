"""The two caches beside the prepared data: reference log-probs, and image features."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vlmdpo import ui
from vlmdpo.config import LossMix
from vlmdpo.data import store
from vlmdpo.errors import DataError
from vlmdpo.training.setup import TrainingSetup

if TYPE_CHECKING:
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
    def losses(self) -> LossMix: ...


def open_reference_cache(
    options: ReferenceOptions,
    args: DPOConfig,
    data: Path,
    model: VisionLanguageModel,
    processor: Processor,
    engine: str,
    rows: int,
) -> ReferenceCache | None:
    """The cache for this run, with what earlier runs computed with the same reference.

    None if it is switched off or cannot be used. Its key holds all that log-probs depend on.
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
    manifest = store.read_manifest(data) or {}
    is_mdpo = options.losses().is_mdpo
    facts = {
        "format": _FORMAT,
        "weights": _weights_digest(model, args),
        "processor": digest.processor_digest(processor),
        "data": [manifest.get("key"), manifest.get("rows_out")],
        "computed": [
            *(str(model.dtype), args.bf16, args.fp16),
            *(engine, args.max_length, args.ld_alpha, describe_attention(model)),
        ],
        "corrupted": args.seed if is_mdpo else None,
        "transformers": version("transformers"),
    }
    rows *= 2 if is_mdpo else 1  # corrupted copies are rows of their own
    cache = reference_cache.ReferenceCache(data, reference_cache.cache_key(facts), rows)
    if cache.num_known:
        ui.say(f"reference log-probs: {cache.num_known:,} of {rows:,} rows found in {cache.path}")
    return cache


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
    manifest = store.read_manifest(data) or {}
    tower = vision_parameters(shared.backbone)
    facts = {
        "tower": digest.tensors_digest(("", tensor) for tensor in tower),
        "processor": digest.processor_digest(setup.processor),
        "data": [manifest.get("key"), manifest.get("rows_out")],
        "computed": [
            *(str(trainer.model.dtype), trainer.args.bf16, trainer.args.fp16),
            describe_attention(trainer.accelerator.unwrap_model(trainer.model)),
        ],
    }
    cache = feature_cache.FeatureCache(data, reference_cache.cache_key(facts))
    examples = setup.examples()
    context = shared.new_batch()
    batch = trainer.data_collator([dict(example) for example in examples])
    doctor.token_logps(trainer, {**batch, BATCH_CONTEXT: context})
    bytes_per_row = context.image_feature_bytes / len(examples)
    known, free = cache.num_rows(), shutil.disk_usage(data).free
    rows = sum(map(len, trainer.datasets))
    needed = bytes_per_row * (rows - known)
    ui.say(
        f"image features: {known:,} of {rows:,} rows found; the others will take about "
        f"{ui.human_bytes(needed)} in {cache.path}"
    )
    if needed > free:
        raise DataError(
            f"--feature-cache: about {ui.human_bytes(needed)} needed, {ui.human_bytes(free)} free "
            f"at '{data}'"
        )
    trainer.feature_cache = cache
    trainer.use_engine(trainer.engine)
