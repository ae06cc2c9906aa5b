"""Options of `vlmdpo estimate-memory`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vlmdpo.config.options import STRATEGIES, Base, need, one_of, option
from vlmdpo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EstimateMemoryConfig(Base):
    """`vlmdpo estimate-memory`: the memory of weights, reference, gradients and optimizer."""

    dtype: str = option(
        "float32",
        "Data type of the weights: float32 (4 bytes a parameter), bfloat16 or float16 (2 bytes)",
    )
    lora: bool = option(False, "Train a LoRA adapter instead of every weight")
    lora_r: int = option(16, "Rank of the LoRA adapter on all linear layers, in dimensions")
    lora_scope: str = option(
        "all", "Where the adapter is: language, connector (with the language model), or all"
    )
    quantization: str = option(
        "none", "Base weights in 4 bits: nf4 (with double quantization), or none"
    )
    per_device_train_batch_size: int = option(2, "Pairs per device and forward pass")
    gradient_accumulation_steps: int = option(32, "Forward passes per optimizer step")
    gradient_checkpointing: bool = option(
        True, "Recompute activations in the backward pass: less memory, more time"
    )
    engine: str = option(
        "shared", "shared runs image and prompt once for both answers; stock is TRL's own way"
    )
    reference_cache: bool = option(
        True, "Reference log-probs on disk, so that full fine-tuning needs no second model"
    )
    optim: str = option(
        "adamw_torch",
        "Optimizer, by its transformers name; one with 8bit in it keeps 8-bit moments",
    )
    image_size: str | None = option(
        None,
        "Size of the pictures in pixels: 490 or 640x480",
        default_text="what prepare would leave, 4:3",
    )
    images: int = option(1, "Pictures in a row, in number")
    image_splitting: bool = option(
        False, "Let Idefics-like processors cut each image into tiles (5 times the image tokens)"
    )
    prompt_tokens: int = option(50, "Tokens of a question, its images apart")
    answer_tokens: int = option(250, "Tokens of each answer")
    dataset: str | None = option(
        None,
        "A folder that `vlmdpo prepare` wrote: its longest rows are the batch (with --fast: as "
        "long as its longest)",
        default_text="rows as long as said",
    )
    gpu: str | None = option(
        None,
        "Does it fit: a GPU (rtx-4090, a100-80gb, h100 ...) or an amount such as 24GiB",
        default_text="no verdict",
    )
    num_gpus: int = option(1, "GPUs that --strategy splits over, in number")
    strategy: str = option(
        "ddp", "How GPUs share a model: ddp (each holds it whole), fsdp2, zero2 or zero3"
    )
    fast: bool = option(
        False, "Answer at once from a closed formula, without torch, some per cent off"
    )
    plot: Path | None = option(None, "PNG of stacked bars to write", default_text="none")

    def __post_init__(self) -> None:
        one_of(self.dtype, ("float32", "bfloat16", "float16"), "dtype")
        one_of(self.lora_scope, ("language", "connector", "all"), "lora_scope")
        one_of(self.quantization, ("none", "nf4"), "quantization")
        one_of(self.engine, ("shared", "stock"), "engine")
        one_of(self.strategy, STRATEGIES, "strategy")
        for name in (
            "lora_r",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "answer_tokens",
            "num_gpus",
        ):
            need(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("images", "prompt_tokens"):
            need(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        sized = self.image_size is None or re.fullmatch(
            r"[1-9]\d{0,4}(x[1-9]\d{0,4})?", self.image_size
        )
        need(bool(sized), "image_size", self.image_size, "pixels, as in 490 or 640x480")
        if self.quantization == "nf4" and not self.lora:
            raise ConfigError(
                "--quantization nf4 needs --lora: weights in 4 bits cannot be trained themselves"
            )
        if self.fast and self.image_splitting:
            raise ConfigError("--fast knows no --image-splitting; leave out one of them")
