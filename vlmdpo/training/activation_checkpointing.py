"""Which language layers recompute their activations in the backward pass.

Sharing frees the memory of a second copy of image and prompt; keeping activations there instead of
recomputing them buys back time. How many layers may keep theirs is measured on this machine, not
guessed.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import gather_object

from vlmdpo import ui
from vlmdpo.errors import ConfigError
from vlmdpo.memory.measure import measure_peak_bytes
from vlmdpo.training.sharding import checkpointable_layers
from vlmdpo.training.trainer import PairTrainer

_OF_DEVICE = 0.9  # of a GPU's memory, where stock TRL's step does not fit it and so sets no bound


def enable(model: Any) -> None:
    """What `Trainer.train` does first with checkpointing on, under the name that this transformers
    has for it.
    """
    turn_on = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    turn_on()


def apply(trainer: PairTrainer, wanted: str, examples: list[dict[str, Any]]) -> None:
    """Set `trainer.checkpointed_layers` from `--checkpointing`: "all", a number, or "auto".

    Args:
        examples: one batch of long rows, which "auto" measures with.

    Raises ConfigError for a number larger than the model has layers, or "auto" with weights spread
    over processes.
    """
    layers = len(checkpointable_layers(trainer.model))
    if wanted == "all":
        return
    if wanted == "auto":
        trainer.checkpointed_layers = _fewest(trainer, layers, examples)
        return
    if int(wanted) > layers:
        raise ConfigError(
            f"--checkpointing: the language model has {layers} layers that can recompute, not "
            f"{wanted}"
        )
    trainer.checkpointed_layers = int(wanted)


def _fewest(trainer: PairTrainer, layers: int, examples: list[dict[str, Any]]) -> int:
    """The fewest layers that keep a step's peak at or below stock TRL's, every layer of which
    recomputes.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ConfigError(
            "--checkpointing auto measures whole weights; under FSDP or DeepSpeed give a number "
            "of layers"
        )
    engine = trainer.engine
    trainer.use_engine("stock")
    budget = step_peak(trainer, layers, examples)
    trainer.use_engine(engine)
    if budget == math.inf:
        device = trainer.args.device
        budget = _OF_DEVICE * torch.cuda.get_device_properties(
            device
        ).total_memory - torch.cuda.memory_allocated(device)
    low, high = 0, layers
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if step_peak(trainer, middle, examples) <= budget else (middle + 1, high)
        )
    chosen = max(gather_object([low])) if trainer.accelerator.num_processes > 1 else low
    ui.say(
        f"checkpointing auto: {chosen} of {layers} layers recompute; a step of ours then peaks at "
        f"{ui.human_bytes(step_peak(trainer, chosen, examples))}, stock TRL's at "
        f"{ui.human_bytes(int(budget))}, weights apart"
    )
    return int(chosen)


def step_peak(trainer: PairTrainer, layers: int, examples: list[dict[str, Any]]) -> float:
    """Peak bytes of one training step with this many layers recomputing, over what lives before;
    inf: out of memory.

    Leaves weights, random numbers and metrics as they were.
    """
    batch = trainer.data_collator([dict(example) for example in examples])
    model, kept = trainer.model, trainer.checkpointed_layers
    was_training = model.training
    model.train()
    enable(model)
    trainer.checkpointed_layers = layers

    def run() -> None:
        trainer.compute_loss(model, trainer._prepare_inputs(batch)).backward()

    try:
        with _as_if_nothing_happened(trainer):
            return measure_peak_bytes(
                run, [*model.parameters(), *model.buffers()], trainer.args.device
            )
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        trainer.checkpointed_layers = kept
        model.train(was_training)


@contextlib.contextmanager
def _as_if_nothing_happened(trainer: PairTrainer) -> Iterator[None]:
    device = trainer.args.device
    metrics, seen = copy.deepcopy(trainer._metrics), trainer._total_train_tokens
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            trainer.model.zero_grad(set_to_none=True)
            trainer._metrics, trainer._total_train_tokens = metrics, seen
