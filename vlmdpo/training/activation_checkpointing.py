"""Which language layers recompute their activations in the backward pass.

The shared engine saves the memory of a second copy of image and prompt; layers that keep their
activations there instead of recomputing them save time. How many can afford it is measured on this
machine.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from vlmdpo import ui
from vlmdpo.errors import ConfigError, is_out_of_memory
from vlmdpo.memory.measure import measure_peak_bytes
from vlmdpo.training.run_trainer import RunTrainer
from vlmdpo.training.sharding import checkpointable_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GPU_SHARE = 0.9  # of a GPU's memory: the limit if stock TRL's step does not fit and sets none


def enable(model: PreTrainedModel) -> None:
    """Switch on recomputation of every layer, as `Trainer.train` does at its start."""
    # The second is its name in older releases of transformers 5.
    turn_on = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    turn_on()


def apply(trainer: RunTrainer, checkpointing: str, examples: list[dict[str, Any]]) -> None:
    """Set `trainer.checkpointed_layers` from `--checkpointing`: "all", a number, or "auto".

    Args:
        examples: one batch of long rows, which "auto" measures with.

    Raises ConfigError for more layers than the model has, or "auto" with sharded weights.
    """
    total = len(checkpointable_layers(trainer.model))
    if checkpointing == "all":
        return
    if checkpointing == "auto":
        trainer.checkpointed_layers = _fewest_layers(trainer, total, examples)
        return
    if int(checkpointing) > total:
        raise ConfigError(
            f"--checkpointing: the language model has {total} layers that can recompute, not "
            f"{checkpointing}"
        )
    trainer.checkpointed_layers = int(checkpointing)


def _fewest_layers(trainer: RunTrainer, total: int, examples: list[dict[str, Any]]) -> int:
    """The fewest recomputing layers with which a step peaks no higher than stock TRL's."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ConfigError(
            "--checkpointing auto measures the whole model; under FSDP or DeepSpeed give a number "
            "of layers"
        )
    engine = trainer.engine
    trainer.use_engine("stock")
    budget = step_peak(trainer, total, examples)
    trainer.use_engine(engine)
    if budget == math.inf:
        device = trainer.args.device
        free, _ = torch.cuda.mem_get_info(device)  # others may use the GPU too
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = _GPU_SHARE * (free + kept)
    low, high = 0, total
    while low < high:
        middle = (low + high) // 2
        if step_peak(trainer, middle, examples) <= budget:
            high = middle
        else:
            low = middle + 1
    fewest = max(gather_object([low])) if trainer.accelerator.num_processes > 1 else low
    ui.say(
        f"checkpointing auto: {fewest} of {total} layers recompute; a step then peaks at "
        f"{ui.human_bytes(step_peak(trainer, fewest, examples))}, stock TRL's at "
        f"{ui.human_bytes(int(budget))}, without weights"
    )
    return int(fewest)


def step_peak(trainer: RunTrainer, layers: int, examples: list[dict[str, Any]]) -> float:
    """Peak bytes of one training step with this many recomputing layers; inf if memory runs out.

    What was allocated before does not count. Weights, random numbers and metrics stay the same.
    """
    batch = trainer.data_collator([dict(example) for example in examples])
    model, layers_before = trainer.model, trainer.checkpointed_layers
    was_training = model.training
    model.train()
    enable(model)
    trainer.checkpointed_layers = layers

    def run() -> None:
        trainer.compute_loss(model, trainer._prepare_inputs(batch)).backward()

    try:
        with _without_side_effects(trainer):
            given = [*model.parameters(), *model.buffers()]
            return measure_peak_bytes(run, given, trainer.args.device)
    except (RuntimeError, MemoryError) as problem:
        if not is_out_of_memory(problem):
            raise
        return math.inf
    finally:
        trainer.checkpointed_layers = layers_before
        model.train(was_training)


@contextlib.contextmanager
def _without_side_effects(trainer: RunTrainer) -> Iterator[None]:
    device = trainer.args.device
    metrics, tokens = copy.deepcopy(trainer._metrics), trainer._total_train_tokens
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            trainer.model.zero_grad(set_to_none=True)
            trainer._metrics, trainer._total_train_tokens = metrics, tokens
