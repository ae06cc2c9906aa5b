"""Options that several commands share, in the groups of `--help`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

from vlmdpo.config.options import Options, option, require, require_at_least, require_choice
from vlmdpo.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
SHARDED_STRATEGIES = ("fsdp2", "zero3")  # no process has all of the weights
LORA_SCOPES = ("language", "connector", "all")
OVER_LENGTH = ("drop", "trim")


@dataclass(frozen=True, kw_only=True)
class ScreenOptions(Options):
    """What is printed."""

    group: ClassVar[str] = "Output"

    json: bool = option(False, "Print one JSON object to stdout, and nothing else there")
    quiet: bool = option(False, "Print only results, warnings and errors, no progress", also="-q")


@dataclass(frozen=True, kw_only=True)
class OutputOptions(ScreenOptions):
    """What is printed, and what may be replaced, uploaded or shared without a question."""

    group: ClassVar[str] = "Output"

    yes: bool = option(
        False, "Answer yes to every question: replace results, upload, share", also="-y"
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Which model, and from where."""

    group: ClassVar[str] = "Model"

    model: str = option(
        "tiny",
        "Alias (tiny, idefics2-8b, llava-1.5-7b ...), Hub id or local folder of the model",
        common=True,
    )
    revision: str | None = option(
        None, "Branch, tag or commit of a model on the Hub", default_text="the main branch"
    )
    trust_remote_code: bool = option(False, "Run code that ships with the model's repository")


@dataclass(frozen=True, kw_only=True)
class PromptOptions(ModelOptions):
    """What prompts hold besides the data."""

    group: ClassVar[str] = "Model"

    system: str | None = option(
        None,
        "System message of conversations that have none of their own",
        default_text="as the adapter was trained, else what the chat template puts there",
    )
    chat_template_kwargs: str | None = option(
        None,
        "Variables of the chat template as JSON, as in '{\"enable_thinking\": true}'",
        default_text="as the adapter was trained, else no reasoning",
    )

    def _check(self) -> None:
        _ = self.template_kwargs

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """`chat_template_kwargs` as values. Raises ConfigError."""
        try:
            values = json.loads(self.chat_template_kwargs or "{}")
        except ValueError as problem:
            raise ConfigError(f"--chat-template-kwargs: not valid JSON: {problem}") from problem
        if not isinstance(values, dict):
            raise ConfigError(
                "--chat-template-kwargs: give names and values, as in "
                "'{\"enable_thinking\": false}'"
            )
        return values


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions(PromptOptions):
    """How a model that is loaded computes."""

    group: ClassVar[str] = "Model"

    dtype: str = option(
        "auto",
        f"Data type of the base weights: {', '.join(DTYPES)}; auto is bfloat16 on a GPU that "
        "computes in it, else float32; float32 for full fine-tuning",
    )
    attn_implementation: str = option(
        "auto",
        f"Attention: {', '.join(ATTENTIONS)}; auto is the model's own (sdpa), and "
        "flash_attention_2 for vision towers on a GPU if its package is installed",
    )
    device: str = option("auto", "Where to compute: auto, cpu, cuda, cuda:1, mps")
    image_splitting: bool = option(
        False, "Let Idefics-like processors split each image into tiles (5 times the image tokens)"
    )

    def _check(self) -> None:
        require_choice(self.dtype, DTYPES, "dtype")
        require_choice(self.attn_implementation, ATTENTIONS, "attn_implementation")


@dataclass(frozen=True, kw_only=True)
class LengthOptions(Options):
    """How large images and how long rows may be."""

    group: ClassVar[str] = "Data"

    max_image_side: int | None = option(
        None,
        "Longest image side in pixels; larger images are reduced when data is prepared",
        default_text="by the model: docs/data.md",
    )
    max_length: int | None = option(
        None,
        "Longest sequence (prompt, image and answer) in tokens",
        default_text="no limit",
        common=True,
    )
    over_length: str = option(
        "drop",
        "Rows longer than --max-length: drop them, or trim their answers (never their images); "
        "either way they are listed",
    )

    def _check(self) -> None:
        require_at_least(self, 1, "max_image_side", unit="pixel")
        require_at_least(self, 8, "max_length", unit="tokens")
        require_choice(self.over_length, OVER_LENGTH, "over_length")


@dataclass(frozen=True, kw_only=True)
class ProcessOptions(Options):
    """Several processes or machines, by accelerate's names."""

    group: ClassVar[str] = "Several processes"

    num_processes: int = option(
        1,
        "Processes over all machines, one per GPU; more than 1 are started through accelerate",
        common=True,
    )
    num_machines: int = option(
        1, "Machines of the run; start the same command on each, with its own --machine-rank"
    )
    machine_rank: int = option(0, "Number of this machine, from 0")
    main_process_ip: str | None = option(
        None, "Address of machine 0", default_text="required for several machines"
    )
    main_process_port: int | None = option(
        None, "Port of machine 0", default_text="29500 for several machines, else a free one"
    )

    def _check(self) -> None:
        require_at_least(self, 1, "num_processes", "num_machines")
        in_range = 0 <= self.machine_rank < self.num_machines
        require(in_range, self, "machine_rank", "a number below --num-machines")
        if self.num_processes % self.num_machines:
            raise ConfigError(
                f"--num-processes {self.num_processes} counts the processes of all machines, so "
                f"it must be a multiple of --num-machines {self.num_machines}"
            )
        if self.num_machines > 1 and self.main_process_ip is None:
            raise ConfigError("--num-machines needs --main-process-ip, the address of machine 0")


def check_quantization(quantization: str, strategy: str) -> None:
    """Raise ConfigError for 4-bit weights that a strategy would split between processes."""
    if quantization != "none" and strategy in SHARDED_STRATEGIES:
        raise ConfigError(
            f"--quantization {quantization}: {strategy} splits weights between processes, which "
            "4-bit weights cannot be; use --strategy ddp or zero2, or leave out --quantization"
        )
