"""Models of which each process holds a part (FSDP2, DeepSpeed): what they are made of, what is
whole, what cannot be.
"""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmdpo.config import TrainConfig
from vlmdpo.distributed.processes import SHARDED_STRATEGIES
from vlmdpo.errors import ConfigError
from vlmdpo.models.families import base_of

_EMBEDDINGS = ("get_input_embeddings", "get_output_embeddings")


def checkpointable_layers(model: Any) -> list[Any]:
    """The language model's layers that can recompute their activations, in order."""
    decoder = base_of(model).base_model.get_decoder()
    return [
        module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)
    ]


def check_sharding(shared: str, config: TrainConfig, dataset: Any) -> None:
    """Raise ConfigError for what cannot work where no process has all of the model."""
    if not shared:
        return
    if config.auto_batch_size:
        raise ConfigError(
            "--auto-batch-size needs whole weights on each GPU; under FSDP or DeepSpeed give the "
            "batch size"
        )
    if config.loss_type == "mdpo" and shared != "zero2":
        raise ConfigError(
            "--loss-type mdpo is not tried with sharded weights; use --strategy ddp or zero2"
        )
    if shared in SHARDED_STRATEGIES and (config.feature_cache or config.checkpointing == "auto"):
        name = "--feature-cache" if config.feature_cache else "--checkpointing auto"
        raise ConfigError(
            f"{name} measures the model before training, which no process has whole; use "
            "--strategy ddp"
        )
    if shared == "zero3" or (shared == "fsdp2" and config.engine == "stock"):
        pictured = [bool(tokens) for tokens in dataset["image_tokens"]]
        if any(pictured) and not all(pictured):
            raise ConfigError(
                f"{pictured.count(False):,} of {len(pictured):,} rows have no picture: under "
                f"{'DeepSpeed ZeRO-3' if shared == 'zero3' else '--engine stock'} processes would "
                "wait for the vision tower of "
                "others; use --strategy fsdp2 and the shared engine, or zero2"
            )


def shard_language_layers(trainer: Any) -> None:
    """FSDP's units: the language model's layers. All else is gathered once a pass, by every
    process.

    Were vision layers units too, a process whose batch has no picture would never ask for them, and
    the others would wait. Nor may the head be one, which accelerate would make it: TRL's loss reads
    its weights without calling it, and gradients of a unit that is never called are not brought
    together.
    """
    plugin, prepare = trainer.accelerator.state.fsdp_plugin, trainer.accelerator.prepare
    plugin.transformer_cls_names_to_wrap = sorted(
        {type(layer).__name__ for layer in checkpointable_layers(trainer.model)}
    )

    def prepare_without_embeddings(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as hidden:
            for name in _EMBEDDINGS:
                hidden.enter_context(
                    mock.patch.object(base_of(trainer.model), name, return_value=None)
                )
            return prepare(*args, **kwargs)

    trainer.accelerator.prepare = prepare_without_embeddings


def active_strategy(trainer: Any) -> str:
    """How the processes of a run share the model, as the model itself shows: single, ddp, fsdp2,
    zero2 or zero3.
    """
    if trainer.args.world_size == 1:
        return "single"
    if trainer.is_deepspeed_enabled:
        return f"zero{trainer.accelerator.state.deepspeed_plugin.zero_stage}"
    return (
        "fsdp2"
        if any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
        else "ddp"
    )


def gather_full_weights(trainer: Any) -> dict[str, Any] | None:
    """All weights on the CPU, brought together from the processes that share them; None where each
    has them whole.

    Every process must call this.
    """
    if trainer.is_deepspeed_enabled:
        found: dict[str, Any] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        return found
    if trainer.is_fsdp_enabled:
        found = trainer.accelerator.get_state_dict(trainer.model)
        return found
    return None
