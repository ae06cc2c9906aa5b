"""Options of the commands that use a model: `vlmdpo infer`, `eval-amber`, `export`, and `demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmdpo.config.options import Processes, Weights, need, one_of, option
from vlmdpo.errors import ConfigError

DIMENSIONS = (
    "existence",
    "attribute",
    "state",
    "number",
    "action",
    "relation",
)  # AMBER's, of its yes/no questions


@dataclass(frozen=True, kw_only=True)
class InferConfig(Weights, Processes):
    """`vlmdpo infer`: one answer, or a JSONL of questions in and a JSONL of answers out."""

    adapter: Path | None = option(
        None, "Folder of a trained adapter", default_text="the base model alone"
    )
    image: Path | None = option(
        None, "Picture to ask about", default_text="a scene of the embedded set"
    )
    question: str | None = option(None, "Question to ask", default_text='"Describe this image."')
    compare: bool = option(False, "Print the answers of base and tuned model side by side")
    input: Path | None = option(
        None, "JSONL of questions: id, image, question on each line", default_text="none"
    )
    output: Path | None = option(
        None, "JSONL of answers to write; goes on where an earlier run stopped", default_text="none"
    )
    image_root: Path | None = option(
        None, "Folder that image paths in --input start from", default_text="the folder of --input"
    )
    batch_size: int = option(8, "Questions per forward pass, in number")
    max_new_tokens: int = option(128, "Longest answer, in tokens")

    def __post_init__(self) -> None:
        Weights.__post_init__(self)
        Processes.__post_init__(self)
        need(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        need(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 token or more")
        if self.compare and self.adapter is None:
            raise ConfigError(
                "--compare needs --adapter FOLDER: base and tuned would be the same model"
            )
        if (self.input is None) != (self.output is None):
            raise ConfigError("--input and --output go together: questions in, answers out")
        if self.input is not None and (
            self.image is not None or self.question is not None or self.compare
        ):
            raise ConfigError(
                "--input asks many questions; leave out --image, --question and --compare"
            )
        if self.num_processes > 1 and self.input is None:
            raise ConfigError("--num-processes is for many questions: give --input and --output")


@dataclass(frozen=True, kw_only=True)
class EvalAmberConfig(Weights, Processes):
    """`vlmdpo eval-amber`: both of AMBER's tasks, scored as AMBER scores them."""

    adapter: Path | None = option(
        None, "Folder of a trained adapter, scored beside the base model", default_text="base only"
    )
    data: Path | None = option(
        None, "AMBER's own data folder (query/, annotations.json)", default_text="the embedded set"
    )
    images: Path | None = option(
        None, "Folder of AMBER's pictures", default_text="DATA/image, or the embedded set's"
    )
    answers: Path | None = option(
        None,
        "Score this response file ([{id, response}]) and load no model",
        default_text="ask the model",
    )
    output_dir: Path | None = option(
        None,
        "Folder for answers and scores",
        default_text="outputs/amber/<data>-<model>, or none with --answers",
    )
    base: bool = option(True, "With --adapter, score the base model too; --no-base skips it")
    task: str = option("all", "discriminative (yes/no questions), generative (descriptions) or all")
    dimension: tuple[str, ...] = option(
        (),
        f"Ask only questions of this dimension ({', '.join(DIMENSIONS)}); may be repeated",
        default_text="all dimensions",
    )
    limit: int | None = option(
        None, "Ask only the first questions of each task, in number", default_text="all questions"
    )
    extractor: str = option(
        "lexicon",
        "How nouns are found in descriptions: lexicon (no download) or official (as AMBER's "
        "scorer; nltk, spaCy)",
    )
    strict: bool = option(
        False,
        'Take only exact "Yes" and "No", as AMBER\'s scorer does, and stop where a picture is bad',
    )
    engine: str = option(
        "shared",
        "shared (picture and common prompt once for all questions), plain (batched generate) or "
        "vllm (an extra)",
    )
    verify: int = option(
        8,
        "Questions that are also asked the plain way first; the shared one is left where they "
        "differ",
    )
    batch_size: int = option(32, "Questions per forward pass, in number")
    max_new_tokens: int = option(8, "Longest answer to a yes/no question, in tokens")
    max_description_tokens: int = option(256, "Longest description, in tokens")
    overwrite: bool = option(
        False, "Remove another run's answers from the output folder, and ask anew"
    )

    def __post_init__(self) -> None:
        Weights.__post_init__(self)
        Processes.__post_init__(self)
        need(self.limit is None or self.limit >= 1, "limit", self.limit, "1 or more")
        need(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        need(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 token or more")
        need(
            self.max_description_tokens >= 1,
            "max_description_tokens",
            self.max_description_tokens,
            "1 token or more",
        )
        need(self.verify >= 0, "verify", self.verify, "0 or more")
        one_of(self.task, ("all", "discriminative", "generative"), "task")
        one_of(self.extractor, ("lexicon", "official"), "extractor")
        one_of(self.engine, ("shared", "plain", "vllm"), "engine")
        for name in self.dimension:
            one_of(name, DIMENSIONS, "dimension")
        if self.dimension and self.task == "generative":
            raise ConfigError("--dimension picks yes/no questions, and --task generative asks none")
        if self.num_processes > 1 and (self.answers is not None or self.engine == "vllm"):
            raise ConfigError(
                "--num-processes is for asking a model, and not by --engine vllm, which has its "
                "own ways"
            )
        if self.answers is not None and self.adapter is not None:
            raise ConfigError(
                "--answers scores a file and --adapter asks a model; give one of them"
            )
        if not self.base and self.adapter is None:
            raise ConfigError("--no-base leaves nothing to score without --adapter FOLDER")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Weights):
    """`vlmdpo compare`: a page on this machine that shows what base and tuned model say, side by
    side.
    """

    adapter: Path | None = option(
        None,
        "Folder of a trained adapter",
        default_text="with the embedded model the one shipped with it",
    )
    amber: Path | None = option(
        None,
        "Folder that eval-amber wrote; its changed answers are the first examples",
        default_text="where eval-amber writes for this adapter, if it has",
    )
    examples: Path | None = option(
        None, "JSONL of more examples: image, question on each line", default_text="none"
    )
    image_root: Path | None = option(
        None, "Folder that paths in --examples start from", default_text="the folder of --examples"
    )
    votes: Path = option(
        Path("outputs/votes/preferences.jsonl"),
        "JSONL that votes are appended to; vlmdpo prepare takes it",
    )
    beta: float | None = option(
        None,
        "Beta of the rewards shown",
        default_text="the one the adapter was trained with, else 0.1",
    )
    max_new_tokens: int = option(128, "Longest answer, in tokens")
    host: str = option(
        "127.0.0.1", "Address to serve on; anything but this machine's own lets others in"
    )
    port: int | None = option(
        None, "Port to serve on", default_text="7860, or the next that is free"
    )
    share: bool = option(
        False,
        "Make the page public through gradio's relay, for 72 hours: anyone with the link can ask",
    )
    open: bool = option(False, "Open the page in a browser")
    max_upload_mb: int = option(20, "Largest picture that can be uploaded, in MB")

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.beta is None or self.beta > 0, "beta", self.beta, "a number above 0")
        need(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 token or more")
        need(self.port is None or 1 <= self.port <= 65535, "port", self.port, "1 to 65535")
        need(self.max_upload_mb >= 1, "max_upload_mb", self.max_upload_mb, "1 MB or more")
        if self.adapter is None and self.model != "tiny":
            raise ConfigError("--adapter FOLDER is needed: what shall the model be compared with?")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Weights):
    """`vlmdpo export`: an adapter as a standalone model, on disk or on the Hub."""

    adapter: Path | None = option(
        None, "Folder of a trained adapter; without --model its base is the one it names"
    )
    merge: bool = option(
        False, "Merge the adapter into its base: a standalone model, checked to answer alike"
    )
    output_dir: Path | None = option(
        None, "Folder for the merged model", default_text="<adapter>-merged"
    )
    push_to_hub: str | None = option(
        None,
        "Upload the merged model, or without --merge the adapter, with its card to this Hub "
        "repository (user/name)",
        default_text="nothing is uploaded",
    )
    private: bool = option(True, "Make the repository of --push-to-hub private where it is new")
    overwrite: bool = option(False, "Replace an earlier export in the output folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter is None:
            raise ConfigError("--adapter FOLDER is needed: the output folder of vlmdpo train")
        if not self.merge and not self.push_to_hub:
            raise ConfigError("nothing to do: give --merge, --push-to-hub user/name, or both")
        if self.output_dir is not None and not self.merge:
            raise ConfigError("--output-dir is for --merge")


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """`vlmdpo env`: what a bug report needs."""

    json: bool = option(False, "Print one JSON object to stdout and nothing else there")
    quiet: bool = option(
        False, "No talk and no progress on stderr: only results, warnings and errors", also="-q"
    )


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """`vlmdpo demo`: all five commands in one run on the embedded model, offline."""

    output_dir: Path = option(
        Path("outputs/demo"),
        "Folder for everything the demo writes; an earlier demo there is replaced",
    )
    seed: int = option(42, "Seed of adapter weights and data order")
    json: bool = option(False, "Print one JSON object to stdout and nothing else there")
    quiet: bool = option(
        False, "No talk and no progress on stderr: only results, warnings and errors", also="-q"
    )
