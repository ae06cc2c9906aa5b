"""Options of `vlmdpo eval-amber`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmdpo.config.common import OutputOptions, ProcessOptions, RuntimeOptions
from vlmdpo.config.options import option, require_at_least, require_choice
from vlmdpo.errors import ConfigError

# AMBER's dimensions of yes/no questions.
DIMENSIONS = ("existence", "attribute", "state", "number", "action", "relation")


@dataclass(frozen=True, kw_only=True)
class EvalAmberConfig(RuntimeOptions, ProcessOptions, OutputOptions):
    """`vlmdpo eval-amber`: both of AMBER's tasks, scored as AMBER scores them."""

    data: Path | None = option(
        None,
        "AMBER's own data folder (query/, annotations.json)",
        default_text="the embedded set",
        group="Data",
    )
    images: Path | None = option(
        None,
        "Folder of AMBER's images",
        default_text="DATA/image, or the embedded set's",
        group="Data",
    )
    answers: Path | None = option(
        None,
        "Score this response file ([{id, response}]) and load no model",
        default_text="ask the model",
        group="Data",
    )
    task: str = option(
        "all",
        "discriminative (yes/no questions), generative (descriptions) or all",
        group="Data",
    )
    dimension: tuple[str, ...] = option(
        (),
        f"Ask only questions of this dimension ({', '.join(DIMENSIONS)}); repeatable",
        default_text="all dimensions",
        group="Data",
    )
    limit: int | None = option(
        None,
        "Ask only this many questions of each task, drawn at random (always the same ones) in the "
        "data's shares of kinds and of yes and no",
        default_text="all questions",
        group="Data",
    )
    adapter: Path | None = option(
        None,
        "Folder of a trained adapter, scored beside the base model; --model defaults to the base "
        "it names",
        default_text="base only",
        group="Model",
    )
    base: bool = option(
        True, "With --adapter, score the base model too; --no-base skips it", group="Model"
    )
    max_new_tokens: int = option(
        8, "Longest answer to a yes/no question, in tokens", group="Generation"
    )
    max_description_tokens: int = option(256, "Longest description, in tokens", group="Generation")
    engine: str = option(
        "shared",
        "shared (image and common prompt once for all questions), plain (batched generate) or "
        "vllm (an extra)",
        group="Memory and speed",
    )
    batch_size: int = option(32, "Questions per forward pass", group="Memory and speed")
    output_dir: Path | None = option(
        None,
        "Folder for answers and scores",
        default_text="outputs/amber/<data>-<model>, or none with --answers",
        group="Output",
    )
    overwrite: bool = option(
        False, "Remove another run's answers from the output folder, and ask anew", group="Output"
    )
    extractor: str = option(
        "lexicon",
        "How nouns are found in descriptions: lexicon (no download) or official (as AMBER's "
        "scorer does, with nltk and spaCy)",
        group="Scoring",
    )
    strict: bool = option(
        False,
        'Accept only exact "Yes" and "No", as AMBER\'s scorer does, and stop at an unreadable '
        "image",
        group="Scoring",
    )
    verify: int = option(
        8,
        "Questions first asked through both engines; if answers differ, plain is used, and vllm "
        "ends the run",
        group="Checks",
    )

    def _check(self) -> None:
        require_at_least(self, 1, "limit", "batch_size")
        require_at_least(self, 1, "max_new_tokens", "max_description_tokens", unit="token")
        require_at_least(self, 0, "verify")
        require_choice(self.task, ("all", "discriminative", "generative"), "task")
        require_choice(self.extractor, ("lexicon", "official"), "extractor")
        require_choice(self.engine, ("shared", "plain", "vllm"), "engine")
        for name in self.dimension:
            require_choice(name, DIMENSIONS, "dimension")
        if self.dimension and self.task == "generative":
            raise ConfigError("--dimension selects yes/no questions; --task generative has none")
        if self.num_processes > 1 and self.answers is not None:
            raise ConfigError("--num-processes is for asking a model; --answers asks none")
        if self.num_processes > 1 and self.engine == "vllm":
            raise ConfigError("--num-processes: vLLM starts its own processes; leave it out")
        if self.answers is not None and self.adapter is not None:
            raise ConfigError(
                "--answers scores a file and --adapter asks a model; give one of them"
            )
        if not self.base and self.adapter is None:
            raise ConfigError("--no-base leaves nothing to score without --adapter FOLDER")
