"""Models that several processes share (FSDP2, DeepSpeed): their units, limits, and full weights."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any, Protocol
from unittest import mock

import torch
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmdpo.config.common import SHARDED_STRATEGIES, check_quantization
from vlmdpo.distributed.processes import launched_strategy
from vlmdpo.errors import ConfigError
from vlmdpo.models.families import unwrap_peft

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from trl import DPOTrainer

    from vlmdpo.models.protocols import VisionLanguageModel

_EMBEDDINGS = ("get_input_embeddings", "get_output_embeddings")


class ShardingOptions(Protocol):
    """The options that not every strategy supports, of several groups."""

    @property
    def auto_batch_size(self) -> bool: ...
    @property
    def feature_cache(self) -> bool: ...
    @property
    def checkpointing(self) -> str: ...
    @property
    def engine(self) -> str: ...
    @property
    def loss_type(self) -> str: ...
    @property
    def quantization(self) -> str: ...


def checkpointable_layers(model: VisionLanguageModel) -> list[GradientCheckpointingLayer]:
    """The language model's layers that can recompute their activations, in order."""
    decoder = unwrap_peft(model).base_model.get_decoder()
    return [
        module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)
    ]


def check_sharding(strategy: str, options: ShardingOptions, dataset: Dataset) -> None:
    """Raise ConfigError for what cannot work if processes share the model.

    Args:
        strategy: of the launcher; "" if each process has the whole model.
    """
    if not strategy:
        return
    check_quantization(options.quantization, strategy)
    if options.auto_batch_size:
        raise ConfigError(
            "--auto-batch-size needs the whole model on each GPU; under FSDP or DeepSpeed set the "
            "batch size"
        )
    if options.loss_type == "mdpo" and strategy != "zero2":
        raise ConfigError(
            "--loss-type mdpo is untested with sharded weights; use --strategy ddp or zero2"
        )
    if strategy in SHARDED_STRATEGIES and (
        options.feature_cache or options.checkpointing == "auto"
    ):
        name = "--feature-cache" if options.feature_cache else "--checkpointing auto"
        raise ConfigError(
            f"{name} measures the whole model before training, and here no process has it; use "
            "--strategy ddp"
        )
    if strategy == "zero3" or (strategy == "fsdp2" and options.engine == "stock"):
        has_image = [bool(tokens) for tokens in dataset["image_tokens"]]
        if any(has_image) and not all(has_image):
            setting = "DeepSpeed ZeRO-3" if strategy == "zero3" else "--engine stock"
            raise ConfigError(
                f"{has_image.count(False):,} of {len(has_image):,} rows have no image: under "
                f"{setting} processes would wait forever for each other's vision tower; use "
                "--strategy fsdp2 with the shared engine, or zero2"
            )


def configure_fsdp(trainer: DPOTrainer) -> None:
    """FSDP's units and precision, where accelerate's own would be wrong for log-probs."""
    _shard_language_layers(trainer)
    _keep_outputs_in_float32(trainer)


def _keep_outputs_in_float32(trainer: DPOTrainer) -> None:
    """Compute in the data type of mixed precision, but neither round outputs to it nor add up
    gradients in it.

    accelerate's policy has one data type for everything. Its bfloat16 would round log-prob sums to
    whole nats (-284.25 to -284), and the reference cache would keep them so.
    """
    plugin = trainer.accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            policy, reduce_dtype=torch.float32, output_dtype=None
        )


def _shard_language_layers(trainer: DPOTrainer) -> None:
    """Make the language model's layers FSDP's units. All else is gathered once per forward pass.

    If vision layers were units too, a process whose batch has no image would never ask for them,
    and the others would wait. The head must not be a unit either, which accelerate would make it:
    TRL's loss reads its weights without calling it, and FSDP does not synchronize gradients of a
    unit that is never called.
    """
    plugin, prepare = trainer.accelerator.state.fsdp_plugin, trainer.accelerator.prepare
    plugin.transformer_cls_names_to_wrap = sorted(
        {type(layer).__name__ for layer in checkpointable_layers(trainer.model)}
    )

    def prepare_without_embeddings(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as hidden:
            for name in _EMBEDDINGS:
                hidden.enter_context(
                    mock.patch.object(unwrap_peft(trainer.model), name, return_value=None)
                )
            return prepare(*args, **kwargs)

    # accelerate has no option for it: it finds embeddings and head by these two methods.
    trainer.accelerator.prepare = prepare_without_embeddings


def any_process_needs(needed_here: bool, device: torch.device) -> bool:
    """Whether this process must run a forward pass: if weights are sharded and any other must.

    With sharded weights a forward pass takes all processes. Every process must call this.

    Args:
        needed_here: whether this process needs it for itself.
        device: of the process.
    """
    if launched_strategy() not in SHARDED_STRATEGIES or not torch.distributed.is_initialized():
        return needed_here
    needed = torch.tensor(int(needed_here), device=device)
    torch.distributed.all_reduce(needed, torch.distributed.ReduceOp.MAX)
    return bool(needed)


def active_strategy(trainer: DPOTrainer) -> str:
    """How processes share the model, read off the model: single, ddp, fsdp2, zero2 or zero3."""
    if trainer.args.world_size == 1:
        return "single"
    if trainer.is_deepspeed_enabled:
        return f"zero{trainer.accelerator.state.deepspeed_plugin.zero_stage}"
    is_sharded = any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    return "fsdp2" if is_sharded else "ddp"


def gather_full_weights(trainer: DPOTrainer) -> dict[str, Tensor] | None:
    """All weights on the CPU, gathered from all processes; None if each has the whole model.

    Every process must call this.
    """
    weights: dict[str, Tensor] | None = None
    if trainer.is_deepspeed_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    elif trainer.is_fsdp_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model)
    return weights
