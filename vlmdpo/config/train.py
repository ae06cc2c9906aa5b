"""Options of `vlmdpo train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmdpo.config.options import STRATEGIES, Processes, Weights, need, one_of, option
from vlmdpo.errors import ConfigError

LOSSES = (
    *(
        "sigmoid",
        "hinge",
        "ipo",
        "exo_pair",
        "nca_pair",
        "robust",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
    ),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
PRESETS: dict[str, tuple[list[str], list[float]]] = {
    "mpo": (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),  # Wang et al. 2024, arXiv 2411.10442
    "mdpo": (["sigmoid"], [3.0]),  # over three pairs a row: see dpo.conditional
}
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "clearml", "swanlab")
PARTS = ("vision", "connector", "language", "head")
RATES = {"LoRA": 5e-5, "full": 5e-7}
SANE_RATES = {
    "LoRA": (1e-6, 5e-4),
    "full": (1e-8, 1e-5),
}  # beyond these a run seldom moves, or falls apart


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Weights, Processes):
    """`vlmdpo train`: DPO with TRL. Names and meanings are TRL's; other `DPOConfig` fields go
    through `--set`.
    """

    dataset: str = option(
        "scenes",
        "A folder that `vlmdpo prepare` wrote, or any dataset it takes (then prepared first)",
    )
    split: str = option("train", "Split of the source, where it is prepared first")
    max_image_side: int | None = option(
        None,
        "Longest image side kept, in pixels, where data is prepared first",
        default_text="half the processor's limit",
    )
    output_dir: Path | None = option(
        None,
        "Folder for adapter, processor, metrics and curves",
        default_text="outputs/<model>-<dataset>-dpo",
    )
    per_device_train_batch_size: int = option(2, "Pairs per device and forward pass")
    gradient_accumulation_steps: int = option(32, "Forward passes per optimizer step")
    auto_batch_size: bool = option(
        False,
        "On a GPU start from the largest batch that is foreseen to fit; where memory runs out all "
        "the same, halve the batch "
        "and double the accumulation. The effective batch stays what the two options above make it",
    )
    num_train_epochs: float = option(1.0, "Passes over the data, in epochs")
    max_steps: int = option(-1, "Optimizer steps, overriding epochs when above 0")
    learning_rate: float | None = option(
        None,
        "Peak learning rate, per step",
        default_text="5e-5 for LoRA, as in the article; 5e-7 for every weight",
    )
    lr_scheduler_type: str = option(
        "linear", "Schedule of the learning rate: linear, cosine, constant ..."
    )
    warmup_steps: float = option(0.0, "Warm-up, in optimizer steps, or below 1 as a share of them")
    beta: float = option(
        0.1, "DPO's beta: how strongly the reference holds the policy back, no unit"
    )
    loss_type: str = option(
        "sigmoid",
        f"Loss, or several joined by commas, of TRL's: {', '.join(LOSSES)}; or mpo (sigmoid, "
        "bco_pair and sft, weighed 0.8, "
        "0.2 and 1), or mdpo (preference over pictures too, and an anchored reward)",
        also="--loss",
    )
    loss_weights: str | None = option(
        None,
        "Weights of several losses, numbers joined by commas",
        default_text="1 each, or mpo's own",
    )
    label_smoothing: float = option(
        0.0,
        "Share of pairs taken to be labelled wrongly, for robust, exo_pair, aot and aot_unpaired",
    )
    max_length: int | None = option(
        None,
        "Longest sequence, prompt and images and answer together, in tokens",
        default_text="no limit",
    )
    over_length: str = option(
        "drop",
        "Rows beyond --max-length: drop them, or trim their answers (images are never cut); "
        "either way they are listed",
    )
    lora: bool = option(
        True, "Train a LoRA adapter; --no-lora trains every weight beside a frozen reference copy"
    )
    lora_r: int = option(16, "Rank of the adapter, in dimensions")
    lora_alpha: int = option(32, "Scale of the adapter; updates count lora_alpha / lora_r times")
    lora_dropout: float = option(0.05, "Dropout on the adapter's input, as a share from 0 to 1")
    use_rslora: bool = option(
        False, "Scale the adapter by lora_alpha / sqrt(lora_r) (rank-stabilized LoRA)"
    )
    use_dora: bool = option(
        False,
        "Train each weight's size apart from its direction (DoRA): slower, often better at low "
        "rank",
    )
    lora_target_modules: str = option(
        "all-linear", "Layers that get an adapter: all-linear, or names joined by commas"
    )
    lora_scope: str = option(
        "all", "Where those layers may be: language, connector (with the language model), or all"
    )
    quantization: str = option(
        "none", "nf4 keeps the base weights in 4 bits (QLoRA; bitsandbytes and a GPU), or none"
    )
    freeze: str = option(
        "",
        "With --no-lora, parts that do not train, joined by commas: vision, connector, language, "
        "head",
        default_text="none",
    )
    engine: str = option(
        "shared",
        "shared runs image and prompt once for both answers; stock is TRL's own way, two rows a "
        "pair",
    )
    group_by_length: bool | None = option(
        None,
        "Put rows of like length into one batch: less padding where answers have rows of their own",
        default_text="only where a model cannot share its prefix; shared rows have no padding",
    )
    reference_cache: bool = option(
        True, "Keep reference log-probs on disk beside the prepared data, for later epochs and runs"
    )
    feature_cache: bool = option(
        False,
        "Keep image features on disk too, where vision and connector do not train (--lora-scope "
        "language): pays over "
        "several epochs or runs with a large vision tower, such as Idefics2's; the size is said "
        "first",
    )
    gradient_checkpointing: bool = option(
        True, "Recompute activations in the backward pass: less memory, more time"
    )
    checkpointing: str = option(
        "all",
        "With gradient checkpointing, the language layers that recompute: all, a number of "
        "layers, or auto, as few as "
        "keep memory below what stock TRL would take",
    )
    bf16: bool | None = option(
        None, "Compute in bfloat16 autocast", default_text="where the GPU has it"
    )
    optim: str = option("adamw_torch", "Optimizer, by its transformers name")
    logging_steps: float = option(10.0, "Optimizer steps between two lines of metrics")
    eval_steps: float | None = option(
        None,
        "Optimizer steps between evaluations on the data's test split (vlmdpo prepare "
        "--test-size), or below 1 as a share of "
        "the run; 0 for none",
        default_text="a tenth of the run, where the data has a test split",
    )
    sample_every: int | None = option(
        None,
        "Optimizer steps between sample answers, which samples.jsonl and run.html keep; 0 for none",
        default_text="before the first step and after the last",
    )
    foresee_memory: bool | None = option(
        None,
        "Foresee the peak memory, in a process beside, to show the measured one against it",
        default_text="on a GPU",
    )
    save_steps: float = option(500.0, "Optimizer steps between two checkpoints")
    save_total_limit: int = option(2, "Checkpoints kept, in number")
    dataloader_num_workers: int = option(0, "Processes that load and preprocess batches, in number")
    report_to: str = option(
        "none", f"Trackers that get the metrics, joined by commas: {', '.join(TRACKERS)}; or none"
    )
    seed: int = option(42, "Seed of adapter weights and data order")
    strategy: str = option(
        "ddp",
        "How processes share a model: ddp (each holds it whole), fsdp2 (each a part of "
        "everything), or DeepSpeed's zero2 "
        "(parts of optimizer and gradients) and zero3 (of the weights too)",
    )
    dry_run: bool = option(
        False,
        "Say what the run would be, its steps and its memory, and stop: offline, nothing is loaded",
    )
    gpu: str | None = option(
        None,
        "With --dry-run, the GPUs to judge for: rtx-4090, 24GiB, 8xa100-80gb ...",
        default_text="no verdict",
    )
    doctor: bool = option(
        False,
        "Check engine, data and model on a few rows, show each finding, and stop before training",
    )
    resume: bool = option(
        False, "Go on from the last checkpoint in the output folder; where none is, from the start"
    )
    overwrite: bool = option(False, "Replace an earlier run in the output folder")
    set: tuple[str, ...] = option(
        (), "Any other DPOConfig field, as key=value; may be repeated", default_text="none"
    )

    def __post_init__(self) -> None:
        Weights.__post_init__(self)
        Processes.__post_init__(self)
        self.losses()
        one_of(self.strategy, STRATEGIES, "strategy")
        for name in self.trackers():
            one_of(name, TRACKERS, "report_to")
        if self.strategy != "ddp" and self.num_processes == 1:
            raise ConfigError(
                f"--strategy {self.strategy} shares a model between processes; give "
                "--num-processes too"
            )
        one_of(self.quantization, ("none", "nf4"), "quantization")
        for part in self.frozen():
            one_of(part, PARTS, "freeze")
        if self.frozen() and self.lora:
            raise ConfigError(
                "--freeze is for --no-lora; an adapter's place is told by --lora-scope"
            )
        if self.quantization != "none" and not self.lora:
            raise ConfigError(
                "--quantization nf4 needs LoRA: weights in 4 bits cannot be trained themselves"
            )
        one_of(self.engine, ("shared", "stock"), "engine")
        one_of(self.over_length, ("drop", "trim"), "over_length")
        one_of(self.lora_scope, ("language", "connector", "all"), "lora_scope")
        counted = self.checkpointing in ("all", "auto") or self.checkpointing.isdigit()
        need(counted, "checkpointing", self.checkpointing, "all, auto, or a number of layers")
        if self.checkpointing != "all" and not self.gradient_checkpointing:
            raise ConfigError(
                f"--checkpointing {self.checkpointing} needs --gradient-checkpointing, which is off"
            )
        if self.feature_cache and (
            self.engine == "stock" or not self.lora or self.lora_scope != "language"
        ):
            raise ConfigError(
                "--feature-cache needs frozen image features: --lora-scope language, and not "
                "--engine stock"
            )
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "lora_r",
            "lora_alpha",
        ):
            need(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        need(
            self.learning_rate is None or self.learning_rate > 0,
            "learning_rate",
            self.learning_rate,
            "a number above 0",
        )
        need(
            self.eval_steps is None or self.eval_steps >= 0,
            "eval_steps",
            self.eval_steps,
            "0 or more",
        )
        need(
            self.sample_every is None or self.sample_every >= 0,
            "sample_every",
            self.sample_every,
            "0 or more",
        )
        for name in ("num_train_epochs", "beta", "logging_steps", "save_steps"):
            need(getattr(self, name) > 0, name, getattr(self, name), "a number above 0")
        need(
            0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "a share from 0 up to 1"
        )
        need(
            self.max_steps == -1 or self.max_steps >= 1,
            "max_steps",
            self.max_steps,
            "1 or more, or -1 for whole epochs",
        )
        need(
            self.max_length is None or self.max_length >= 8,
            "max_length",
            self.max_length,
            "8 tokens or more",
        )
        need(self.save_total_limit >= 1, "save_total_limit", self.save_total_limit, "1 or more")
        need(
            self.dataloader_num_workers >= 0,
            "dataloader_num_workers",
            self.dataloader_num_workers,
            "0 or more",
        )
        need(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        if ":" in self.device:
            raise ConfigError(
                f"--device: train takes auto, cpu, cuda or mps; choose '{self.device}' by "
                "CUDA_VISIBLE_DEVICES"
            )
        if self.gpu is not None and not self.dry_run:
            raise ConfigError("--gpu is for --dry-run; a run takes the GPUs that are there")
        if self.resume and self.overwrite:
            raise ConfigError(
                "--resume goes on with what --overwrite would delete; give one of them"
            )

    @property
    def peak_learning_rate(self) -> float:
        """`--learning-rate`, or what suits the way of training: a full model takes a hundredth of
        an adapter's.
        """
        return (
            self.learning_rate
            if self.learning_rate is not None
            else RATES["LoRA" if self.lora else "full"]
        )

    def trackers(self) -> tuple[str, ...]:
        """The names of `--report-to`; empty for none."""
        return tuple(
            name
            for name in (part.strip() for part in self.report_to.split(","))
            if name not in ("none", "")
        )

    def frozen(self) -> tuple[str, ...]:
        """The parts of `--freeze`."""
        return tuple(part.strip() for part in self.freeze.split(",") if part.strip())

    def losses(self) -> tuple[list[str], list[float], bool]:
        """TRL's losses, their weights, and whether batches are mDPO's. Raises ConfigError where
        they do not fit together.
        """
        names = [name.strip() for name in self.loss_type.split(",")]
        for name in names:
            one_of(name, (*LOSSES, *PRESETS), "loss_type")
        if set(names) & set(PRESETS) and len(names) > 1:
            raise ConfigError(
                f"--loss-type: {' and '.join(set(names) & set(PRESETS))} cannot be joined with "
                "other losses"
            )
        names, weights = PRESETS.get(self.loss_type, (names, [1.0] * len(names)))
        if self.loss_weights is not None:
            weights = self._weights(len(names))
        if self.label_smoothing and not set(names) & {"robust", "exo_pair", "aot", "aot_unpaired"}:
            raise ConfigError(
                f"--label-smoothing has no effect on --loss-type {self.loss_type}; use robust"
            )
        conditional = self.loss_type == "mdpo"
        if conditional and (self.engine == "stock" or self.loss_weights is not None):
            raise ConfigError("--loss-type mdpo needs the shared engine, and its terms count alike")
        return list(names), list(weights), conditional

    def _weights(self, count: int) -> list[float]:
        try:
            weights = [float(weight) for weight in str(self.loss_weights).split(",")]
        except ValueError as problem:
            raise ConfigError(
                f"--loss-weights: '{self.loss_weights}' is no list of numbers, as in 0.8,0.2,1"
            ) from problem
        if len(weights) != count:
            raise ConfigError(f"--loss-weights: {len(weights)} weights for {count} losses")
        return weights
