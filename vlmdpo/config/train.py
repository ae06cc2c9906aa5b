"""Options of `vlmdpo train`."""

from __future__ import annotations

from dataclasses import dataclass

from vlmdpo.config.common import RuntimeOptions, check_quantization
from vlmdpo.config.train_output import CheckOptions, TrainOutputOptions
from vlmdpo.config.training import (
    DataOptions,
    LoraOptions,
    LossOptions,
    RunOptions,
    SpeedOptions,
    TrainProcessOptions,
)
from vlmdpo.errors import ConfigError

DEFAULT_RATES = {"LoRA": 5e-5, "full": 5e-7}
# Beyond these, training hardly moves the model, or diverges.
USUAL_RATES = {"LoRA": (1e-6, 5e-4), "full": (1e-8, 1e-5)}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    DataOptions,
    RuntimeOptions,
    RunOptions,
    LoraOptions,
    LossOptions,
    SpeedOptions,
    TrainProcessOptions,
    TrainOutputOptions,
    CheckOptions,
):
    """`vlmdpo train`: DPO with TRL, whose names and meanings the options keep. `--set` reaches the
    other fields of `DPOConfig`.
    """

    def _check(self) -> None:
        if self.losses().is_mdpo and self.engine == "stock":
            raise ConfigError("--loss-type mdpo needs the shared engine: leave out --engine stock")
        has_frozen_features = self.lora and self.lora_scope == "language"
        if self.feature_cache and (self.engine == "stock" or not has_frozen_features):
            raise ConfigError(
                "--feature-cache needs frozen image features: --lora-scope language, without "
                "--engine stock"
            )
        if self.keep_best and self.strategy in ("zero2", "zero3"):
            raise ConfigError(
                f"--keep-best cannot go back to earlier weights under --strategy {self.strategy}; "
                "use ddp or fsdp2"
            )
        check_quantization(self.quantization, self.strategy)
        if self.adapter is not None and self.strategy == "zero3":
            raise ConfigError(
                "--adapter keeps a copy of the adapter as the reference, which is untested with "
                "ZeRO-3's sharded weights; use --strategy fsdp2, ddp or zero2"
            )
        if ":" in self.device:
            raise ConfigError(
                f"--device: train takes auto, cpu, cuda or mps; select '{self.device}' with "
                "CUDA_VISIBLE_DEVICES"
            )

    @property
    def weights_dtype(self) -> str:
        """`--dtype`, which for full fine-tuning is float32 unless another is named.

        A step of 5e-7 is smaller than bfloat16's rounding of most weights, which would not move.
        """
        return "float32" if self.dtype == "auto" and not self.lora else self.dtype

    @property
    def peak_learning_rate(self) -> float:
        """`--learning-rate`, or the default for LoRA or full fine-tuning."""
        if self.learning_rate is not None:
            return self.learning_rate
        return DEFAULT_RATES["LoRA" if self.lora else "full"]
