"""What each command can be told: one frozen dataclass a command, the only home of defaults and range checks.

The command line is made from these fields (`cli.py`), and a YAML recipe has the same keys, so there is no
second list of options to keep in step. Layers, weakest first: the default here, the model's own recipe
(only the embedded model has one), the recipe file, the flags.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdpo.errors import ConfigError, nearest

DTYPES = ("auto", "float32", "bfloat16", "float16")
DIMENSIONS = ("existence", "attribute", "state", "number", "action", "relation")  # AMBER's, of its yes/no questions
LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)


def option(default: Any, text: str, *, default_text: str | None = None, flag: str | None = None) -> Any:
    """A dataclass field that is also a command-line option.

    Args:
        default: the value where nobody says otherwise.
        text: the help line, with the unit where there is one.
        default_text: how the help states the default where the value alone would not tell (`None`, say).
        flag: the option's spelling where it is not the field's own name.
    """
    return dataclasses.field(default=default, metadata={"help": text, "default_text": default_text, "flag": flag})


def _need(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"{flag_name(name)}: {value!r} is out of range; give {wanted}")


def _one_of(value: str, known: Iterable[str], name: str) -> None:
    known = tuple(known)
    if value not in known:
        raise ConfigError(f"{flag_name(name)}: unknown value '{value}'.{nearest(value, known)} Known: {', '.join(known)}")


def flag_name(field: str) -> str:
    """The spelling of a field on the command line."""
    return "--" + field.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class _Base:
    """What every command that loads a model can be told."""

    model: str = option("tiny", "Model: an alias (tiny, idefics2-8b, llava-1.5-7b ...), a Hub id or a local folder")
    revision: str | None = option(None, "Branch, tag or commit of a Hub model", default_text="the main branch")
    trust_remote_code: bool = option(False, "Run code that the model's repository ships")
    json: bool = option(False, "Print one JSON object to stdout and nothing else there")


@dataclass(frozen=True, kw_only=True)
class _Weights(_Base):
    """What every command that runs a model can be told."""

    dtype: str = option("auto", f"Data type of the base weights: {', '.join(DTYPES)}; auto is bfloat16 on a GPU that has it")
    device: str = option("auto", "Where to compute: auto, cpu, cuda, cuda:1, mps")
    image_splitting: bool = option(False, "Let Idefics-like processors cut each image into tiles (5 times the image tokens)")

    def __post_init__(self) -> None:
        _one_of(self.dtype, DTYPES, "dtype")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(_Base):
    """`vlmdpo prepare`: preference pairs in, a checked dataset out."""

    dataset: str = option(
        "scenes",
        "Preference data: an alias (scenes, rlaif-v), a Hub id, or a local Parquet, JSONL, JSON, CSV or WebDataset tar file, "
        "a folder of one kind of them, or a save_to_disk folder",
    )
    split: str = option("train", 'Split of the source, slices included: "train", "train[:1%]", "train[100:200]"')
    subset: str | None = option(None, "Configuration of a Hub dataset", default_text="its only one")
    dataset_revision: str | None = option(None, "Branch, tag or commit of a Hub dataset", default_text="the main branch")
    streaming: bool = option(False, "Read a Hub dataset while it is downloaded, and keep no copy of it")
    map: tuple[str, ...] = option(
        (),
        "Where the format is not recognised: which column is image, images, question, chosen, rejected, as in "
        "question=prompt,chosen=answers.0; may be repeated",
        default_text="recognised by the columns",
    )
    image_root: Path | None = option(
        None, "Folder that paths of pictures start from, and stay in", default_text="the folder of the data"
    )
    output_dir: Path | None = option(None, "Folder for the prepared dataset", default_text="outputs/data/<dataset>-<key>")
    max_image_side: int | None = option(
        None, "Longest image side kept, in pixels; larger images are reduced", default_text="half the processor's limit"
    )
    max_length: int | None = option(
        None, "Longest sequence, prompt and images and answer together, in tokens", default_text="no limit"
    )
    over_length: str = option("drop", "Rows beyond --max-length: drop them, or trim their answers (images are never cut)")
    limit: int | None = option(None, "Take at most this many rows, counted in rows", default_text="all rows")
    on_bad: str = option("drop", "A row that cannot be used: drop (counted by reason) or fail (stop at one)")
    test_size: float = option(
        0.0, "Rows set aside as a test split, as a share below 1 or a number; no image is in both", default_text="none"
    )
    shuffle: bool = option(False, "Put rows in another order, by --seed")
    seed: int = option(42, "Seed of --shuffle and of what --test-size sets aside")
    num_proc: int | None = option(
        None, "Processes that work at once, in number", default_text="one for every 4,000 rows, up to the CPU's cores"
    )
    show: int = option(0, "Row number of the example to show, counted from 0")
    push_to_hub: str | None = option(
        None, "Upload the prepared dataset, with a card, to this Hub repository (user/name)", default_text="nothing is uploaded"
    )
    private: bool = option(True, "Make the repository of --push-to-hub private where it is new")
    overwrite: bool = option(False, "Prepare again even where a finished result of the same call exists")

    def __post_init__(self) -> None:
        _need(self.max_image_side is None or self.max_image_side >= 1, "max_image_side", self.max_image_side, "1 pixel or more")
        _need(self.max_length is None or self.max_length >= 8, "max_length", self.max_length, "8 tokens or more")
        _need(self.limit is None or self.limit >= 1, "limit", self.limit, "1 row or more")
        _need(self.num_proc is None or self.num_proc >= 1, "num_proc", self.num_proc, "1 or more")
        shared = 0 <= self.test_size < 1 or (self.test_size >= 1 and self.test_size == int(self.test_size))
        _need(shared, "test_size", self.test_size, "a share below 1, or a whole number of rows")
        _one_of(self.on_bad, ("drop", "fail"), "on_bad")
        _one_of(self.over_length, ("drop", "trim"), "over_length")
        _need(self.show >= 0, "show", self.show, "0 or more")
        self.mapping()
        if self.streaming and "[" in self.split:
            raise ConfigError(f"--split {self.split} cuts by row number, which --streaming does not know; give --limit instead")

    def mapping(self) -> dict[str, str]:
        """`--map` as {target: column}. Raises ConfigError where it cannot be read."""
        found: dict[str, str] = {}
        for pair in (one.strip() for given in self.map for one in given.split(",")):
            target, is_pair, column = pair.partition("=")
            if not is_pair or not column or target in found:
                raise ConfigError(f"--map: cannot read '{pair}'; give each target once, as in question=prompt,chosen=good")
            _one_of(target, ("image", "images", "question", "chosen", "rejected"), "map")
            found[target] = column
        return found


@dataclass(frozen=True, kw_only=True)
class EstimateMemoryConfig(_Base):
    """`vlmdpo estimate-memory`: the memory of weights, reference, gradients and optimizer."""

    dtype: str = option("float32", "Data type of the weights: float32 (4 bytes a parameter), bfloat16 or float16 (2 bytes)")
    lora: bool = option(False, "Train a LoRA adapter instead of every weight")
    lora_r: int = option(16, "Rank of the LoRA adapter on all linear layers, in dimensions")
    lora_scope: str = option("all", "Where the adapter is: language, connector (with the language model), or all")
    quantization: str = option("none", "Base weights in 4 bits: nf4 (with double quantization), or none")
    per_device_train_batch_size: int = option(2, "Pairs per device and forward pass")
    gradient_accumulation_steps: int = option(32, "Forward passes per optimizer step")
    gradient_checkpointing: bool = option(True, "Recompute activations in the backward pass: less memory, more time")
    engine: str = option("shared", "shared runs image and prompt once for both answers; stock is TRL's own way")
    reference_cache: bool = option(True, "Reference log-probs on disk, so that full fine-tuning needs no second model")
    optim: str = option("adamw_torch", "Optimizer, by its transformers name; one with 8bit in it keeps 8-bit moments")
    image_size: str | None = option(
        None, "Size of the pictures in pixels: 490 or 640x480", default_text="what prepare would leave, 4:3"
    )
    images: int = option(1, "Pictures in a row, in number")
    image_splitting: bool = option(False, "Let Idefics-like processors cut each image into tiles (5 times the image tokens)")
    prompt_tokens: int = option(50, "Tokens of a question, its images apart")
    answer_tokens: int = option(250, "Tokens of each answer")
    dataset: str | None = option(
        None,
        "A folder that `vlmdpo prepare` wrote: its longest rows are the batch (with --fast: as long as its longest)",
        default_text="rows as long as said",
    )
    gpu: str | None = option(
        None, "Does it fit: a GPU (rtx-4090, a100-80gb, h100 ...) or an amount such as 24GiB", default_text="no verdict"
    )
    num_gpus: int = option(1, "GPUs that --strategy splits over, in number")
    strategy: str = option("ddp", "ddp (every GPU holds all), fsdp, zero2 or zero3")
    fast: bool = option(False, "Answer at once from a closed formula, without torch, some per cent off")
    plot: Path | None = option(None, "PNG of stacked bars to write", default_text="none")

    def __post_init__(self) -> None:
        _one_of(self.dtype, ("float32", "bfloat16", "float16"), "dtype")
        _one_of(self.lora_scope, ("language", "connector", "all"), "lora_scope")
        _one_of(self.quantization, ("none", "nf4"), "quantization")
        _one_of(self.engine, ("shared", "stock"), "engine")
        _one_of(self.strategy, ("ddp", "fsdp", "zero2", "zero3"), "strategy")
        for name in ("lora_r", "per_device_train_batch_size", "gradient_accumulation_steps", "answer_tokens", "num_gpus"):
            _need(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("images", "prompt_tokens"):
            _need(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        sized = self.image_size is None or re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})?", self.image_size)
        _need(bool(sized), "image_size", self.image_size, "pixels, as in 490 or 640x480")
        if self.quantization == "nf4" and not self.lora:
            raise ConfigError("--quantization nf4 needs --lora: weights in 4 bits cannot be trained themselves")
        if self.fast and self.image_splitting:
            raise ConfigError("--fast knows no --image-splitting; leave out one of them")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Weights):
    """`vlmdpo train`: DPO with TRL. Names and meanings are TRL's; other `DPOConfig` fields go through `--set`."""

    dataset: str = option("scenes", "A folder that `vlmdpo prepare` wrote, or any dataset it takes (then prepared first)")
    split: str = option("train", "Split of the source, where it is prepared first")
    max_image_side: int | None = option(
        None, "Longest image side kept, in pixels, where data is prepared first", default_text="half the processor's limit"
    )
    output_dir: Path | None = option(
        None, "Folder for adapter, processor, metrics and curves", default_text="outputs/<model>-<dataset>-dpo"
    )
    per_device_train_batch_size: int = option(2, "Pairs per device and forward pass")
    gradient_accumulation_steps: int = option(32, "Forward passes per optimizer step")
    auto_batch_size: bool = option(
        False,
        "On a GPU start from the largest batch that is foreseen to fit; where memory runs out all the same, halve the batch "
        "and double the accumulation. The effective batch stays what the two options above make it",
    )
    num_train_epochs: float = option(1.0, "Passes over the data, in epochs")
    max_steps: int = option(-1, "Optimizer steps, overriding epochs when above 0")
    learning_rate: float = option(5e-5, "Peak learning rate, per step")
    lr_scheduler_type: str = option("linear", "Schedule of the learning rate: linear, cosine, constant ...")
    warmup_steps: float = option(0.0, "Warm-up, in optimizer steps, or below 1 as a share of them")
    beta: float = option(0.1, "DPO's beta: how strongly the reference holds the policy back, no unit")
    loss_type: str = option("sigmoid", f"TRL loss: {', '.join(LOSSES)}")
    max_length: int | None = option(
        None, "Longest sequence, prompt and images and answer together, in tokens", default_text="no limit"
    )
    over_length: str = option(
        "drop", "Rows beyond --max-length: drop them, or trim their answers (images are never cut); either way they are listed"
    )
    lora: bool = option(True, "Train a LoRA adapter; --no-lora trains every weight beside a frozen reference copy")
    lora_r: int = option(16, "Rank of the adapter, in dimensions")
    lora_alpha: int = option(32, "Scale of the adapter; updates count lora_alpha / lora_r times")
    lora_dropout: float = option(0.05, "Dropout on the adapter's input, as a share from 0 to 1")
    lora_target_modules: str = option("all-linear", "Layers that get an adapter: all-linear, or names joined by commas")
    lora_scope: str = option("all", "Where those layers may be: language, connector (with the language model), or all")
    engine: str = option(
        "shared", "shared runs image and prompt once for both answers; stock is TRL's own way, two rows a pair"
    )
    group_by_length: bool | None = option(
        None,
        "Put rows of like length into one batch: less padding where answers have rows of their own",
        default_text="only where a model cannot share its prefix; shared rows have no padding",
    )
    reference_cache: bool = option(True, "Keep reference log-probs on disk beside the prepared data, for later epochs and runs")
    feature_cache: bool = option(
        False,
        "Keep image features on disk too, where vision and connector do not train (--lora-scope language): pays over "
        "several epochs or runs with a large vision tower, such as Idefics2's; the size is said first",
    )
    gradient_checkpointing: bool = option(True, "Recompute activations in the backward pass: less memory, more time")
    checkpointing: str = option(
        "all",
        "With gradient checkpointing, the language layers that recompute: all, a number of layers, or auto, as few as "
        "keep memory below what stock TRL would take",
    )
    bf16: bool | None = option(None, "Compute in bfloat16 autocast", default_text="where the GPU has it")
    optim: str = option("adamw_torch", "Optimizer, by its transformers name")
    logging_steps: float = option(10.0, "Optimizer steps between two lines of metrics")
    save_steps: float = option(500.0, "Optimizer steps between two checkpoints")
    save_total_limit: int = option(2, "Checkpoints kept, in number")
    dataloader_num_workers: int = option(0, "Processes that load and preprocess batches, in number")
    report_to: str = option("none", "Trackers: none, tensorboard, wandb, mlflow, trackio")
    seed: int = option(42, "Seed of adapter weights and data order")
    doctor: bool = option(False, "Check engine, data and model on a few rows, show each finding, and stop before training")
    resume: bool = option(False, "Go on from the last checkpoint in the output folder")
    overwrite: bool = option(False, "Replace an earlier run in the output folder")
    set: tuple[str, ...] = option((), "Any other DPOConfig field, as key=value; may be repeated", default_text="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of(self.loss_type, LOSSES, "loss_type")
        _one_of(self.engine, ("shared", "stock"), "engine")
        _one_of(self.over_length, ("drop", "trim"), "over_length")
        _one_of(self.lora_scope, ("language", "connector", "all"), "lora_scope")
        counted = self.checkpointing in ("all", "auto") or self.checkpointing.isdigit()
        _need(counted, "checkpointing", self.checkpointing, "all, auto, or a number of layers")
        if self.checkpointing != "all" and not self.gradient_checkpointing:
            raise ConfigError(f"--checkpointing {self.checkpointing} needs --gradient-checkpointing, which is off")
        if self.feature_cache and (self.engine == "stock" or not self.lora or self.lora_scope != "language"):
            raise ConfigError("--feature-cache needs frozen image features: --lora-scope language, and not --engine stock")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "lora_r", "lora_alpha"):
            _need(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("num_train_epochs", "learning_rate", "beta", "logging_steps", "save_steps"):
            _need(getattr(self, name) > 0, name, getattr(self, name), "a number above 0")
        _need(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "a share from 0 up to 1")
        _need(self.max_steps == -1 or self.max_steps >= 1, "max_steps", self.max_steps, "1 or more, or -1 for whole epochs")
        _need(self.max_length is None or self.max_length >= 8, "max_length", self.max_length, "8 tokens or more")
        _need(self.save_total_limit >= 1, "save_total_limit", self.save_total_limit, "1 or more")
        _need(self.dataloader_num_workers >= 0, "dataloader_num_workers", self.dataloader_num_workers, "0 or more")
        _need(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        if ":" in self.device:
            raise ConfigError(f"--device: train takes auto, cpu, cuda or mps; choose '{self.device}' by CUDA_VISIBLE_DEVICES")
        if self.resume and self.overwrite:
            raise ConfigError("--resume goes on with what --overwrite would delete; give one of them")


@dataclass(frozen=True, kw_only=True)
class InferConfig(_Weights):
    """`vlmdpo infer`: one answer, or a JSONL of questions in and a JSONL of answers out."""

    adapter: Path | None = option(None, "Folder of a trained adapter", default_text="the base model alone")
    image: Path | None = option(None, "Picture to ask about", default_text="a scene of the embedded set")
    question: str | None = option(None, "Question to ask", default_text='"Describe this image."')
    compare: bool = option(False, "Print the answers of base and tuned model side by side")
    input: Path | None = option(None, "JSONL of questions: id, image, question on each line", default_text="none")
    output: Path | None = option(None, "JSONL of answers to write; goes on where an earlier run stopped", default_text="none")
    image_root: Path | None = option(
        None, "Folder that image paths in --input start from", default_text="the folder of --input"
    )
    batch_size: int = option(8, "Questions per forward pass, in number")
    max_new_tokens: int = option(128, "Longest answer, in tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        _need(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        _need(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 token or more")
        if self.compare and self.adapter is None:
            raise ConfigError("--compare needs --adapter FOLDER: base and tuned would be the same model")
        if (self.input is None) != (self.output is None):
            raise ConfigError("--input and --output go together: questions in, answers out")
        if self.input is not None and (self.image is not None or self.question is not None or self.compare):
            raise ConfigError("--input asks many questions; leave out --image, --question and --compare")


@dataclass(frozen=True, kw_only=True)
class EvalAmberConfig(_Weights):
    """`vlmdpo eval-amber`: both of AMBER's tasks, scored as AMBER scores them."""

    adapter: Path | None = option(None, "Folder of a trained adapter, scored beside the base model", default_text="base only")
    data: Path | None = option(None, "AMBER's own data folder (query/, annotations.json)", default_text="the embedded set")
    images: Path | None = option(None, "Folder of AMBER's pictures", default_text="DATA/image, or the embedded set's")
    answers: Path | None = option(
        None, "Score this response file ([{id, response}]) and load no model", default_text="ask the model"
    )
    output_dir: Path | None = option(
        None, "Folder for answers and scores", default_text="outputs/amber/<data>-<model>, or none with --answers"
    )
    base: bool = option(True, "With --adapter, score the base model too; --no-base skips it")
    task: str = option("all", "discriminative (yes/no questions), generative (descriptions) or all")
    dimension: tuple[str, ...] = option(
        (), f"Ask only questions of this dimension ({', '.join(DIMENSIONS)}); may be repeated", default_text="all dimensions"
    )
    limit: int | None = option(None, "Ask only the first questions of each task, in number", default_text="all questions")
    extractor: str = option(
        "lexicon", "How nouns are found in descriptions: lexicon (no download) or official (as AMBER's scorer; nltk, spaCy)"
    )
    strict: bool = option(False, 'Take only exact "Yes" and "No", as AMBER\'s scorer does, and stop where a picture is bad')
    engine: str = option(
        "shared", "shared (picture and common prompt once for all questions), plain (batched generate) or vllm (an extra)"
    )
    verify: int = option(8, "Questions that are also asked the plain way first; the shared one is left where they differ")
    batch_size: int = option(32, "Questions per forward pass, in number")
    max_new_tokens: int = option(8, "Longest answer to a yes/no question, in tokens")
    max_description_tokens: int = option(256, "Longest description, in tokens")
    overwrite: bool = option(False, "Remove another run's answers from the output folder, and ask anew")

    def __post_init__(self) -> None:
        super().__post_init__()
        _need(self.limit is None or self.limit >= 1, "limit", self.limit, "1 or more")
        _need(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        _need(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 token or more")
        _need(self.max_description_tokens >= 1, "max_description_tokens", self.max_description_tokens, "1 token or more")
        _need(self.verify >= 0, "verify", self.verify, "0 or more")
        _one_of(self.task, ("all", "discriminative", "generative"), "task")
        _one_of(self.extractor, ("lexicon", "official"), "extractor")
        _one_of(self.engine, ("shared", "plain", "vllm"), "engine")
        for name in self.dimension:
            _one_of(name, DIMENSIONS, "dimension")
        if self.dimension and self.task == "generative":
            raise ConfigError("--dimension picks yes/no questions, and --task generative asks none")
        if self.answers is not None and self.adapter is not None:
            raise ConfigError("--answers scores a file and --adapter asks a model; give one of them")
        if not self.base and self.adapter is None:
            raise ConfigError("--no-base leaves nothing to score without --adapter FOLDER")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """`vlmdpo demo`: all five commands in one run on the embedded model, offline."""

    output_dir: Path = option(Path("outputs/demo"), "Folder for everything the demo writes; an earlier demo there is replaced")
    seed: int = option(42, "Seed of adapter weights and data order")
    json: bool = option(False, "Print one JSON object to stdout and nothing else there")
