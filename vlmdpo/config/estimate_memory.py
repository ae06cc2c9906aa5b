"""Options of `vlmdpo estimate-memory`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vlmdpo.config.common import (
    LORA_SCOPES,
    STRATEGIES,
    ModelOptions,
    OutputOptions,
    check_quantization,
)
from vlmdpo.config.options import option, require, require_at_least, require_choice
from vlmdpo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EstimateMemoryConfig(ModelOptions, OutputOptions):
    """`vlmdpo estimate-memory`: the memory of weights, reference, gradients, optimizer and step."""

    dataset: str | None = option(
        None,
        "A folder written by `vlmdpo prepare`: its longest rows are the batch (with --fast, rows "
        "as long as its longest)",
        default_text="rows of the lengths below",
        group="Data",
    )
    image_size: str | None = option(
        None,
        "Size of the images in pixels: 490 or 640x480",
        default_text="what prepare would leave, 4:3",
        group="Data",
    )
    images: int = option(1, "Images per row", group="Data")
    image_splitting: bool = option(
        False,
        "Let Idefics-like processors split each image into tiles (5 times the image tokens)",
        group="Data",
    )
    prompt_tokens: int = option(50, "Tokens of a question, without its images", group="Data")
    answer_tokens: int = option(250, "Tokens of each answer", group="Data")
    pairs_per_prompt: int | None = option(
        None,
        "Rows of one image and prompt in a batch, whose answers all differ, the most there can be. "
        "With --dataset only 1: its rows as if no two of a batch had an image in common",
        default_text="1, or what the rows of --dataset share",
        group="Data",
    )
    dtype: str = option(
        "float32",
        "Data type of the weights: float32 (4 bytes per parameter), bfloat16 or float16 (2 bytes)",
        group="Model",
    )
    per_device_train_batch_size: int = option(
        2, "Pairs per device and forward pass", group="Training"
    )
    gradient_accumulation_steps: int = option(
        32, "Forward passes per optimizer step", group="Training"
    )
    optim: str = option(
        "auto",
        "Optimizer, by its name in transformers; names with 8bit keep 8-bit moments; auto is "
        "adamw_torch_fused",
        group="Training",
    )
    set: tuple[str, ...] = option(
        (),
        "A field of TRL's DPOConfig as given to train, as key=value; repeatable",
        default_text="none",
        group="Training",
    )
    lora: bool = option(False, "Train a LoRA adapter instead of every weight", group="Adapter")
    adapter: Path | None = option(
        None,
        "Folder of a trained LoRA adapter that train would go on from: LoRA of its rank, and a "
        "copy of it as the reference; --model defaults to the base it names",
        default_text="a new adapter",
        group="Adapter",
    )
    lora_r: int = option(16, "Rank of the LoRA adapter on all linear layers", group="Adapter")
    lora_scope: str = option(
        "all",
        "Part of the model with an adapter: language, connector (and language), or all",
        group="Adapter",
    )
    quantization: str = option(
        "none",
        "Base weights in 4 bits: nf4 (with double quantization), or none",
        group="Adapter",
    )
    gradient_checkpointing: bool = option(
        True,
        "Recompute activations in the backward pass: less memory, more time",
        group="Memory and speed",
    )
    engine: str = option(
        "shared",
        "shared computes image and prompt once for both answers; stock is TRL's own way",
        group="Memory and speed",
    )
    reference_cache: bool = option(
        True,
        "Reference log-probs on disk, so that full fine-tuning needs no second model",
        group="Memory and speed",
    )
    num_gpus: int = option(1, "GPUs that --strategy splits over", group="Several processes")
    strategy: str = option(
        "ddp",
        "How GPUs share a model: ddp (a full copy each), fsdp2, zero2 or zero3",
        group="Several processes",
    )
    plot: Path | None = option(
        None, "PNG of stacked bars to write", default_text="none", group="Output"
    )
    gpu: str | None = option(
        None,
        "Does it fit? A GPU (rtx-4090, a100-80gb, h100 ...) or an amount such as 24GiB",
        default_text="no verdict",
        group="Checks",
    )
    fast: bool = option(
        False,
        "Answer at once from a closed formula, without torch, accurate to some per cent",
        group="Checks",
    )

    def _check(self) -> None:
        require_choice(self.dtype, ("float32", "bfloat16", "float16"), "dtype")
        require_choice(self.lora_scope, LORA_SCOPES, "lora_scope")
        require_choice(self.quantization, ("none", "nf4"), "quantization")
        require_choice(self.engine, ("shared", "stock"), "engine")
        require_choice(self.strategy, STRATEGIES, "strategy")
        require_at_least(self, 1, "lora_r", "per_device_train_batch_size", "answer_tokens")
        require_at_least(self, 1, "gradient_accumulation_steps", "num_gpus")
        require_at_least(self, 0, "images", "prompt_tokens")
        is_size = self.image_size is None or re.fullmatch(
            r"[1-9]\d{0,4}(x[1-9]\d{0,4})?", self.image_size
        )
        require(bool(is_size), self, "image_size", "pixels, as in 490 or 640x480")
        if self.quantization == "nf4" and not self.lora:
            raise ConfigError("--quantization nf4 needs --lora: 4-bit weights cannot be trained")
        check_quantization(self.quantization, self.strategy)
        if self.pairs_per_prompt is not None:
            require_at_least(self, 1, "pairs_per_prompt")
        if self.dataset and (self.pairs_per_prompt or 1) > 1:
            raise ConfigError(
                "--pairs-per-prompt: the rows of --dataset say what they share; leave out one of "
                "them"
            )
        if self.fast and self.set:
            raise ConfigError("--fast has no formula for --set; leave out one of them")
        if self.fast and self.image_splitting:
            raise ConfigError("--fast has no formula for --image-splitting; leave out one of them")
