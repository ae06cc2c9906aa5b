"""Options of `vlmdpo infer`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmdpo.config.common import OutputOptions, ProcessOptions, RuntimeOptions
from vlmdpo.config.options import option, require_at_least
from vlmdpo.errors import ConfigError


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
        "JSONL of questions: id, image, question on each line",
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
        "Folder of a trained adapter",
        default_text="the base model alone",
        group="Model",
    )
    compare: bool = option(
        False, "Print the answers of base and tuned model side by side", group="Output"
    )
    max_new_tokens: int = option(128, "Longest answer, in tokens", group="Generation")
    batch_size: int = option(8, "Questions per forward pass", group="Memory and speed")

    def _check(self) -> None:
        require_at_least(self, 1, "batch_size")
        require_at_least(self, 1, "max_new_tokens", unit="token")
        if self.compare and self.adapter is None:
            raise ConfigError(
                "--compare needs --adapter FOLDER: base and tuned would be the same model"
            )
        if (self.input is None) != (self.output is None):
            raise ConfigError("--input and --output go together: questions in, answers out")
        asks_one = self.image is not None or self.question is not None or self.compare
        if self.input is not None and asks_one:
            raise ConfigError(
                "--input asks many questions; leave out --image, --question and --compare"
            )
        if self.num_processes > 1 and self.input is None:
            raise ConfigError("--num-processes is for many questions: give --input and --output")
