"""Options of `vlmdpo infer`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmdpo.config.common import OutputOptions, ProcessOptions, RuntimeOptions
from vlmdpo.config.options import option, require, require_at_least, require_choice
from vlmdpo.errors import ConfigError

ENGINES = ("plain", "vllm")


@dataclass(frozen=True, kw_only=True)
class InferConfig(RuntimeOptions, ProcessOptions, OutputOptions):
    """`vlmdpo infer`: one answer, or a JSONL of questions in and a JSONL of answers out."""

    image: Path | None = option(
        None, "Image to ask about", default_text="a scene of the embedded set", group="Data"
    )
    question: str | None = option(
        None, "Question to ask", default_text='"Describe this image."', group="Data"
    )
    input: Path | None = option(
        None,
        "JSONL of questions: image and question on each line, and an id, else the line's number",
        default_text="none",
        group="Data",
    )
    output: Path | None = option(
        None,
        "JSONL of answers to write; continues where an earlier run stopped",
        default_text="none",
        group="Data",
    )
    image_root: Path | None = option(
        None,
        "Folder that image paths in --input start from",
        default_text="the folder of --input",
        group="Data",
    )
    adapter: Path | None = option(
        None,
        "Folder of a trained adapter; --model defaults to the base it names",
        default_text="the base model alone",
        group="Model",
    )
    compare: bool = option(
        False, "Print the answers of base and tuned model side by side", group="Output"
    )
    max_new_tokens: int = option(128, "Longest answer, in tokens", group="Generation")
    temperature: float = option(
        0.0,
        "Draw answers at this temperature; 0 takes the likeliest token at each step",
        group="Generation",
    )
    top_p: float = option(
        1.0,
        "Draw from the likeliest tokens that together have this probability",
        group="Generation",
    )
    num_return_sequences: int = option(1, "Answers drawn for each question", group="Generation")
    seed: int = option(42, "Seed of the draws", group="Generation")
    engine: str = option(
        "plain",
        "plain (batched generate) or vllm (an extra, for GPUs)",
        group="Memory and speed",
    )
    batch_size: int = option(8, "Questions per forward pass", group="Memory and speed")

    def _check(self) -> None:
        require_at_least(self, 1, "batch_size", "num_return_sequences")
        require_at_least(self, 1, "max_new_tokens", unit="token")
        require(0 <= self.temperature < float("inf"), self, "temperature", "0 or more")
        require(0 < self.top_p <= 1, self, "top_p", "a number above 0, up to 1")
        require_choice(self.engine, ENGINES, "engine")
        if self.temperature == 0 and (self.num_return_sequences > 1 or self.top_p < 1):
            which = "--top-p" if self.top_p < 1 else "--num-return-sequences"
            raise ConfigError(f"{which} is for answers that are drawn: give --temperature, as in 1")
        if self.compare and self.adapter is None:
            raise ConfigError(
                "--compare needs --adapter FOLDER: base and tuned would be the same model"
            )
        self._check_files()

    def _check_files(self) -> None:
        if (self.input is None) != (self.output is None):
            raise ConfigError("--input and --output go together: questions in, answers out")
        asks_one = self.image is not None or self.question is not None or self.compare
        if self.input is not None and asks_one:
            raise ConfigError(
                "--input asks many questions; leave out --image, --question and --compare"
            )
        if self.num_processes > 1 and self.input is None:
            raise ConfigError("--num-processes is for many questions: give --input and --output")
        if self.num_processes > 1 and self.engine == "vllm":
            raise ConfigError("--num-processes: vLLM starts its own processes; leave it out")
