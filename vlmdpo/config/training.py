"""The options of `vlmdpo train`, a dataclass per group: functions ask for the groups they read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from vlmdpo.config.common import (
    LORA_SCOPES,
    STRATEGIES,
    LengthOptions,
    ProcessOptions,
)
from vlmdpo.config.options import (
    Options,
    option,
    require,
    require_at_least,
    require_choice,
    require_positive,
)
from vlmdpo.errors import ConfigError

LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
# Name → TRL's losses and their weights.
LOSS_PRESETS: dict[str, tuple[list[str], list[float]]] = {
    "mpo": (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),  # Wang et al. 2024, arXiv 2411.10442
    "mdpo": (["sigmoid"], [3.0]),  # mean over three comparisons per row: see training.mdpo
}
_SMOOTHED_LOSSES = {"robust", "exo_pair", "aot", "aot_unpaired"}
# What --best-by names → the metric of the test split, and 1 if more is better, or -1 if less is.
BEST_BY = {
    "loss": ("loss", -1),
    "accuracy": ("rewards/accuracies", 1),
    "margin": ("rewards/margins", 1),
}
MODEL_PARTS = ("vision", "connector", "language", "head")


@dataclass(frozen=True, kw_only=True)
class DataOptions(LengthOptions):
    """Which rows are trained on."""

    group: ClassVar[str] = "Data"

    dataset: str = option(
        "scenes",
        "A folder written by `vlmdpo prepare`, or any dataset it accepts (prepared first)",
        common=True,
    )
    split: str = option("train", "Split of the source, if it is prepared first")
    data_of_another_model: bool = option(
        False,
        "Train on data that was prepared for another model, though its images may be smaller and "
        "rows may be missing",
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Batches, steps and optimizer."""

    group: ClassVar[str] = "Training"

    learning_rate: float | None = option(
        None,
        "Peak learning rate",
        default_text="5e-5 for LoRA, as in the article; 5e-7 for full fine-tuning",
        common=True,
    )
    per_device_train_batch_size: int = option(2, "Pairs per device and forward pass", common=True)
    gradient_accumulation_steps: int = option(32, "Forward passes per optimizer step", common=True)
    num_train_epochs: float = option(1.0, "Passes over the data, in epochs", common=True)
    max_steps: int = option(
        -1, "Optimizer steps; overrides --num-train-epochs if above 0", common=True
    )
    lr_scheduler_type: str = option(
        "linear", "Learning rate schedule: linear, cosine, constant ..."
    )
    warmup_steps: float = option(
        0.0, "Warm-up in optimizer steps, or as a share of them if below 1"
    )
    optim: str = option(
        "auto",
        "Optimizer, by its name in transformers; auto is adamw_torch_fused on a GPU, else "
        "adamw_torch",
    )
    seed: int = option(42, "Seed of adapter weights and data order")
    eval_steps: float | None = option(
        None,
        "Optimizer steps between evaluations on the test split (vlmdpo prepare --test-size), or "
        "a share of the run if below 1; 0 for none",
        default_text="a tenth of the run, if the data has a test split",
    )
    keep_best: bool = option(
        False,
        "Save the weights that are best on the test split, not those of the last step",
    )
    best_by: str = option("loss", "What --keep-best judges by: loss, accuracy or margin")
    early_stopping: int | None = option(
        None,
        "With --keep-best, stop after this many evaluations in a row without a better one",
        default_text="never",
    )
    set: tuple[str, ...] = option(
        (), "Any other field of TRL's DPOConfig, as key=value; repeatable", default_text="none"
    )

    def _check(self) -> None:
        require_positive(self, "learning_rate", "num_train_epochs")
        require_at_least(self, 1, "per_device_train_batch_size", "gradient_accumulation_steps")
        require_at_least(self, 0, "warmup_steps", "eval_steps")
        require_at_least(self, 1, "early_stopping", unit="evaluation")
        require_choice(self.best_by, BEST_BY, "best_by")
        if self.keep_best and self.eval_steps == 0:
            raise ConfigError("--keep-best judges by evaluations, which --eval-steps 0 leaves out")
        if self.early_stopping and not self.keep_best:
            raise ConfigError("--early-stopping needs --keep-best, which says what is better")
        is_count = self.max_steps == -1 or self.max_steps >= 1
        require(is_count, self, "max_steps", "1 or more, or -1 for whole epochs")


@dataclass(frozen=True, kw_only=True)
class LoraOptions(Options):
    """Which weights train: an adapter's, or the model's own."""

    group: ClassVar[str] = "Adapter"

    lora: bool = option(
        True,
        "Train a LoRA adapter; --no-lora trains every weight, against a frozen reference",
        common=True,
    )
    adapter: Path | None = option(
        None,
        "Folder of a trained LoRA adapter to go on from: its model, frozen, is the reference, its "
        "rank and layers stay, and --model defaults to the base it names",
        default_text="a new adapter",
        common=True,
    )
    lora_r: int = option(16, "Rank of the adapter", common=True)
    lora_alpha: int = option(32, "Scale of the adapter: updates count lora_alpha / lora_r times")
    lora_dropout: float = option(0.05, "Dropout on the adapter's input, from 0 to 1")
    use_rslora: bool = option(
        False, "Scale the adapter by lora_alpha / sqrt(lora_r) (rank-stabilized LoRA)"
    )
    use_dora: bool = option(
        False,
        "Train magnitude and direction of each weight separately (DoRA): slower, often better at "
        "low rank",
    )
    lora_target_modules: str = option(
        "all-linear", "Layers that get an adapter: all-linear, or comma-separated names"
    )
    lora_scope: str = option(
        "all",
        "Part of the model in which they get one: language, connector (and language), or all",
    )
    quantization: str = option(
        "none",
        "nf4 keeps the base weights in 4 bits (QLoRA; needs bitsandbytes and a GPU), or none",
        common=True,
    )
    freeze: str = option(
        "",
        "With --no-lora, comma-separated parts that stay frozen: vision, connector, language, head",
        default_text="none",
    )

    def _check(self) -> None:
        require_at_least(self, 1, "lora_r", "lora_alpha")
        require(0 <= self.lora_dropout < 1, self, "lora_dropout", "a share from 0 up to 1")
        require_choice(self.lora_scope, LORA_SCOPES, "lora_scope")
        require_choice(self.quantization, ("none", "nf4"), "quantization")
        for part in self.frozen_parts():
            require_choice(part, MODEL_PARTS, "freeze")
        if self.frozen_parts() and self.lora:
            raise ConfigError("--freeze needs --no-lora; use --lora-scope to place an adapter")
        if self.adapter is not None and not self.lora:
            raise ConfigError(
                "--adapter goes on with LoRA: leave out --no-lora, or merge the adapter with "
                "vlmdpo export --merge and give the result as --model"
            )
        if self.quantization != "none" and not self.lora:
            raise ConfigError("--quantization nf4 needs LoRA: 4-bit weights cannot be trained")

    def frozen_parts(self) -> tuple[str, ...]:
        """The parts named by `--freeze`."""
        return tuple(part.strip() for part in self.freeze.split(",") if part.strip())


class LossMix(NamedTuple):
    """TRL's losses with a weight each, and whether rows are mDPO's three comparisons."""

    names: list[str]
    weights: list[float]
    is_mdpo: bool


@dataclass(frozen=True, kw_only=True)
class LossOptions(Options):
    """What is minimized."""

    group: ClassVar[str] = "Loss"

    loss_type: str = option(
        "sigmoid",
        f"Loss, or comma-separated losses, by TRL's names: {', '.join(LOSSES)}; or mpo (sigmoid, "
        "bco_pair and sft, weighted 0.8, 0.2 and 1); or mdpo (also compares images, and anchors "
        "the chosen reward)",
        also="--loss",
        common=True,
    )
    loss_weights: str | None = option(
        None,
        "Weights of several losses, comma-separated numbers",
        default_text="1 each, or mpo's own",
    )
    beta: float = option(
        0.1, "DPO's beta: how strongly the policy is held to the reference", common=True
    )
    label_smoothing: float = option(
        0.0, "Assumed share of wrongly labelled pairs, for robust, exo_pair, aot and aot_unpaired"
    )

    def _check(self) -> None:
        require_positive(self, "beta")
        self.losses()

    def losses(self) -> LossMix:
        """The losses to train with. Raises ConfigError if they cannot be combined."""
        names = [name.strip() for name in self.loss_type.split(",")]
        for name in names:
            require_choice(name, (*LOSSES, *LOSS_PRESETS), "loss_type")
        presets = set(names) & set(LOSS_PRESETS)
        if presets and len(names) > 1:
            raise ConfigError(
                f"--loss-type: {' and '.join(sorted(presets))} cannot be combined with other losses"
            )
        names, weights = LOSS_PRESETS.get(self.loss_type, (names, [1.0] * len(names)))
        is_mdpo = self.loss_type == "mdpo"
        if self.loss_weights is not None:
            if is_mdpo:
                raise ConfigError("--loss-type mdpo weights its terms equally: no --loss-weights")
            weights = self._parsed_weights(len(names))
        if self.label_smoothing and not set(names) & _SMOOTHED_LOSSES:
            raise ConfigError(
                f"--label-smoothing has no effect on --loss-type {self.loss_type}; use robust"
            )
        return LossMix(list(names), list(weights), is_mdpo)

    def _parsed_weights(self, count: int) -> list[float]:
        try:
            weights = [float(weight) for weight in str(self.loss_weights).split(",")]
        except ValueError as problem:
            raise ConfigError(
                f"--loss-weights: cannot read '{self.loss_weights}' as numbers; write 0.8,0.2,1"
            ) from problem
        if len(weights) != count:
            raise ConfigError(f"--loss-weights: {len(weights)} weights for {count} losses")
        return weights


@dataclass(frozen=True, kw_only=True)
class SpeedOptions(Options):
    """What is computed once, kept, or recomputed."""

    group: ClassVar[str] = "Memory and speed"

    auto_batch_size: bool = option(
        False,
        "Start from the largest batch that is estimated to fit the GPU, and halve it if memory "
        "runs out; accumulation changes with it, so the effective batch stays the same",
        common=True,
    )
    engine: str = option(
        "shared",
        "shared computes image and prompt once for both answers; stock is TRL's own way, two "
        "rows per pair",
    )
    gradient_checkpointing: bool = option(
        True, "Recompute activations in the backward pass: less memory, more time"
    )
    checkpointing: str = option(
        "all",
        "Language layers that recompute under gradient checkpointing: all, a number, or auto (as "
        "few as keep memory below stock TRL's)",
    )
    reference_cache: bool = option(
        True, "Keep reference log-probs on disk beside the prepared data, for later epochs and runs"
    )
    feature_cache: bool = option(
        False,
        "Keep image features on disk too; needs --lora-scope language. Pays off over several "
        "epochs or runs with a large vision tower, such as Idefics2's; the size is shown first",
    )
    group_by_length: bool | None = option(
        None,
        "Batch rows of similar length: less padding if each answer has a row of its own",
        default_text="only if a model cannot share its prefix; shared rows have no padding",
    )
    group_by_image: bool | None = option(
        None,
        "Let rows of one image, and of one prompt, meet in a forward pass, which computes what "
        "they share once",
        default_text="if rows have an image or a prompt in common and the engine is shared",
    )
    bf16: bool | None = option(
        None, "Compute in bfloat16 autocast", default_text="on if the GPU supports it"
    )
    dataloader_num_workers: int | None = option(
        None,
        "Processes that load and preprocess batches",
        default_text="up to 4 on a GPU, by the cores at hand; 0 on a CPU",
    )

    def _check(self) -> None:
        require_choice(self.engine, ("shared", "stock"), "engine")
        known = self.checkpointing in ("all", "auto") or self.checkpointing.isdigit()
        require(known, self, "checkpointing", "all, auto, or a number of layers")
        require_at_least(self, 0, "dataloader_num_workers")
        if self.checkpointing != "all" and not self.gradient_checkpointing:
            raise ConfigError(
                f"--checkpointing {self.checkpointing} needs --gradient-checkpointing, which is off"
            )


@dataclass(frozen=True, kw_only=True)
class TrainProcessOptions(ProcessOptions):
    """Several processes that train one model."""

    group: ClassVar[str] = "Several processes"

    strategy: str = option(
        "ddp",
        "How processes share a model: ddp (a full copy each), fsdp2 (a part of everything each), "
        "or DeepSpeed's zero2 (parts of optimizer and gradients) and zero3 (of weights too)",
        common=True,
    )

    def _check(self) -> None:
        require_choice(self.strategy, STRATEGIES, "strategy")
        if self.strategy != "ddp" and self.num_processes == 1:
            raise ConfigError(
                f"--strategy {self.strategy} shares a model between processes; add --num-processes"
            )
