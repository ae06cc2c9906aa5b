"""Models of real size with random weights, built on the device, and trainers that share them.

Nothing is downloaded: architectures are the package's own records, a processor of the same family
stands beside each (a letter is a token), and weights are drawn on the device in seconds.
"""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.initialization import no_init_weights

from vlmdpo.config import TrainConfig
from vlmdpo.data.pairs import message
from vlmdpo.data.store import pair_features
from vlmdpo.engine.collate import PairCollator
from vlmdpo.engine.forward import check_pairs_shareable
from vlmdpo.engine.packed_attention import CannotShare
from vlmdpo.engine.reference_cache import ReferenceCache
from vlmdpo.engine.stock_collator import StockCollator
from vlmdpo.memory.architecture import Architecture, load_architecture
from vlmdpo.memory.fast import known_architectures
from vlmdpo.models.families import fallback_chat_template
from vlmdpo.models.protocols import Processor
from vlmdpo.tiny import random_models
from vlmdpo.training import activation_checkpointing
from vlmdpo.training.arguments import dpo_config, lora_config
from vlmdpo.training.make_trainer import make_trainer
from vlmdpo.training.trainer import PairTrainer

_WEIGHT_STD, _TOY_WEIGHT_STD = 0.02, 0.1  # a toy's narrow layers need larger weights to matter


@dataclass
class Machine:
    """Where the items run, and what they hand on to each other.

    Attributes:
        toy: tiny models in place of real ones, to try the script on a CPU.
        folder: a temporary folder.
        deadline: when measuring must end, by `time.monotonic`.
        held: a model or trainers that the next item may use too, by a name; see `hold`.
    """

    device: torch.device
    toy: bool
    folder: Path
    deadline: float
    held: dict[str, Any] = field(default_factory=dict)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of base weights and autocast. A toy's is float32: many CPUs emulate bfloat16, slowly."""
        return torch.float32 if self.toy else torch.bfloat16

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def clock(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def hold(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, kept until another name is asked for: a card holds few of them."""
        if name not in self.held:
            self.release()
            self.held[name] = make()
        return self.held[name]

    def release(self) -> None:
        """Forget what is held, and give its memory back to the driver."""
        self.held.clear()
        # Trainers and wrapped models refer to themselves, so only the collector frees them.
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def allocated_bytes(self) -> int | None:
        return torch.cuda.memory_allocated(self.device) if self.is_cuda else None

    def peak_of(self, run: Callable[[], object]) -> dict[str, int] | None:
        """Highest bytes allocated and reserved during a call, with all there was before; None
        without CUDA, where nothing counts them.
        """
        if not self.is_cuda:
            run()
            return None
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return {
            "allocated": torch.cuda.max_memory_allocated(self.device),
            "reserved": torch.cuda.max_memory_reserved(self.device),
        }


def architecture(machine: Machine, alias: str) -> Architecture:
    """A registry entry's architecture at real size, or its family's tiny one."""
    if not machine.toy or alias == "tiny":
        return load_architecture(alias)
    config, processor = random_models.FAMILIES[known_architectures()[alias]["family"]]({}, {}, 32)
    processor.chat_template = processor.chat_template or fallback_chat_template(processor)
    return Architecture(config, processor)


def build(machine: Machine, config: Any, dtype: torch.dtype) -> Any:
    """The model on the device, with random weights. Raises FloatingPointError for a NaN."""
    torch.manual_seed(0)
    with torch.device(machine.device), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.tie_weights()
    randomize(model, _TOY_WEIGHT_STD if machine.toy else _WEIGHT_STD)
    model.eval()
    return model


@torch.no_grad()
def randomize(model: torch.nn.Module, std: float) -> None:
    """Matrices and embeddings from a normal distribution, norms as if untrained, biases zero."""
    for module in model.modules():
        kind = type(module).__name__.lower()
        is_norm = "norm" in kind
        # Gemma's norms scale by 1 + weight.
        unit = 0.0 if is_norm and "gemma" in kind else 1.0
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("bias"):
                parameter.zero_()
            elif is_norm:
                parameter.fill_(unit)
            else:
                parameter.normal_(0.0, std)
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise FloatingPointError(f"{name} is not finite")


def twin(model: Any) -> Any:
    """A second model on the same weights and buffers, so that one of the two may be wrapped."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def random_rows(
    count: int,
    image: tuple[int, int],
    prompt: int,
    answers: tuple[int, int],
    *,
    one_prompt: bool = False,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Pairs of random pixels and letters; a letter is a token.

    Args:
        image: (width, height) in pixels.
        prompt: letters of a question.
        answers: shortest and longest answer.
        one_prompt: all pairs have the same image and question.
    """
    rng = np.random.default_rng(seed)

    def letters(length: int) -> str:
        return "".join(rng.choice(list("abcdefgh"), size=length))

    def picture() -> Image.Image:
        return Image.fromarray(rng.integers(0, 255, (image[1], image[0], 3), dtype=np.uint8))

    def answer() -> list[Any]:
        return [message("assistant", letters(int(rng.integers(answers[0], answers[1] + 1))))]

    shared = (picture(), letters(prompt))
    rows = []
    for _ in range(count):
        pixels, question = shared if one_prompt else (picture(), letters(prompt))
        rows.append(
            {
                "images": [pixels],
                "prompt": [message("user", question, 1)],
                "chosen": answer(),
                "rejected": answer(),
            }
        )
    return list(Dataset.from_list(rows, features=pair_features()).add_column("row", range(count)))


def trainer_of(
    machine: Machine,
    shape: Architecture,
    model: Any,
    rows: list[dict[str, Any]],
    *,
    engine: str,
    reference_cache: ReferenceCache | None = None,
    **settings: Any,
) -> PairTrainer:
    """The trainer of a real run, as it is when its first step begins; its adapter is not zero.

    Args:
        settings: of `TrainConfig`. bf16 autocast is on, but for toys, unless they say otherwise.
    """
    settings = {"bf16": not machine.toy, "per_device_train_batch_size": len(rows), **settings}
    settings.setdefault("gradient_accumulation_steps", 1)
    config = TrainConfig(device=machine.device.type, **settings)
    torch.manual_seed(0)
    trainer = make_trainer(
        engine=engine,
        model=model,
        reference_model=None,
        processor=shape.processor,
        train_dataset=Dataset.from_list(rows),
        args=dpo_config(config, machine.folder, machine.device),
        lora_config=lora_config(config, model),
        reference_cache=reference_cache,
    )
    # What `Trainer.train` does before its loop.
    trainer.accelerator.prepare_model(trainer.model)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps
    if config.gradient_checkpointing:
        activation_checkpointing.enable(trainer.model)
    trainer.model.train()
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05 if machine.toy else 0.01)
    return trainer


class Duo:
    """Stock TRL's trainer and ours, on the same weights; each has an adapter of its own, equal at
    first.

    Attributes:
        engine: ours: "shared", or "rows" for a model that cannot share.
    """

    def __init__(
        self,
        machine: Machine,
        shape: Architecture,
        model: Any,
        rows: list[dict[str, Any]],
        **settings: Any,
    ) -> None:
        try:
            check_pairs_shareable(model)
            self.engine = "shared"
        except CannotShare:
            self.engine = "rows"
        # Ours changes the model's methods and attention, stock's must be as transformers left it.
        self.stock = trainer_of(machine, shape, twin(model), rows, engine="stock", **settings)
        self.ours = trainer_of(machine, shape, model, rows, engine=self.engine, **settings)
        self.align()

    @torch.no_grad()
    def align(self) -> None:
        """Make both start alike again, after they took different steps: stock's adapter gets the
        values of ours, and ours forgets reference log-probs.
        """
        self.ours.reference_cache = None
        self.ours.precompute_ref_logps = False  # set where a cache was used
        ours = trained(self.ours)
        for name, parameter in trained(self.stock).items():
            parameter.copy_(ours[name])


def trained(trainer: PairTrainer) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}


def own_bytes(trainer: PairTrainer) -> int:
    """Bytes of what a trainer does not share with its twin: adapter, gradients, optimizer."""
    tensors = list(trained(trainer).values())
    tensors += [p.grad for p in tensors if p.grad is not None]
    for state in trainer.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def collate(trainer: PairTrainer, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return trainer.data_collator([dict(row) for row in rows])


def collate_stock(processor: Processor, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows as stock TRL lays them out, also where its own collator cannot make them."""
    examples = [dict(row) for row in rows]
    if fallback_chat_template(processor) is None:
        return StockCollator(processor)(examples)
    batch = PairCollator(processor, share=False)(examples)
    copies = batch.pop("image_copies")
    return {**batch, "pixel_values": batch["pixel_values"].repeat(copies, 1, 1, 1)}


def optimizer_step(trainer: PairTrainer, *batches: dict[str, Any]) -> torch.Tensor:
    """One whole training step: forward, reference, backward, clipping, optimizer. The loss."""
    losses = [trainer.training_step(trainer.model, dict(batch)) for batch in batches]
    torch.nn.utils.clip_grad_norm_(trained(trainer).values(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return torch.stack(losses).sum()


def loss_and_gradients(
    trainer: PairTrainer, batch: dict[str, Any]
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a batch and the gradients by name, which the trainer then forgets."""
    loss = trainer.training_step(trainer.model, dict(batch)).item()
    gradients = {n: p.grad.float() for n, p in trained(trainer).items() if p.grad is not None}
    trainer.model.zero_grad(set_to_none=True)
    return loss, gradients


def gradient_difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    """‖first − second‖ ÷ ‖first‖, over all parameters together."""
    apart = sum(float((g - second[n]).double().square().sum()) for n, g in first.items())
    return math.sqrt(apart / sum(float(g.double().square().sum()) for g in first.values()))


def pad_rows(batch: dict[str, Any], count: int, padding: int) -> dict[str, Any]:
    """Stock rows with `count` more tokens of padding on the right, which change nothing but how
    kernels round.
    """
    shape = batch["input_ids"].shape
    fill = {"input_ids": padding}
    return {
        name: torch.nn.functional.pad(value, (0, count), value=fill.get(name, 0))
        if isinstance(value, torch.Tensor) and value.shape == shape
        else value
        for name, value in batch.items()
    }
