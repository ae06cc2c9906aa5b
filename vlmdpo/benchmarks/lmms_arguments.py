"""From a model to lmms-eval's arguments: which of its model classes, and what it is given.

lmms-eval has a class per family, each with arguments of its own. Which one fits is said here only
where its source was read; for others, and for what a class takes besides, users write
`--lmms-args`.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from vlmdpo.errors import ConfigError

# By transformers' model type, the name that `--model` has.
MODEL_CLASSES = {
    "gemma3": "gemma3",
    "gemma4": "gemma4",
    "idefics2": "idefics2",
    "internvl": "internvl_hf",
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "mllama": "llama_vision",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_vl": "qwen2_vl",
    "qwen3_vl": "qwen3_vl",
}
TAKES_DTYPE = ("idefics2", "llama_vision", "llava_hf")  # the others always load in bfloat16
# What vlmdpo gives itself; of some it has an option of its own.
_OURS = ("tasks", "output_path", "log_samples", "config", "limit", "device")
_OWN_OPTIONS = ("limit", "device")


@dataclass(frozen=True)
class LmmsArguments:
    """`--lmms-args`, read.

    Attributes:
        model: its `--model`; None if it names none.
        model_args: its `--model_args`.
        rest: all others, as they stand.
    """

    model: str | None
    model_args: str
    rest: tuple[str, ...]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"--lmms-args: {message}")


def parse(text: str) -> LmmsArguments:
    """Read `--lmms-args`. Raises ConfigError, also for arguments that vlmdpo gives itself."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in ("model", "model_args", *_OURS):
        if name == "log_samples":
            parser.add_argument("--log_samples", action="store_true", default=None)
        else:
            parser.add_argument(f"--{name}")
    try:
        found, rest = parser.parse_known_args(shlex.split(text))
    except ValueError as problem:  # a quote that is not closed
        raise ConfigError(f"--lmms-args: {problem}") from problem
    for name in _OURS:
        if getattr(found, name) is not None:
            raise ConfigError(
                f"--lmms-args: vlmdpo gives --{name} itself; leave it out"
                + (f" and use vlmdpo's own --{name}" if name in _OWN_OPTIONS else "")
            )
    model_args = found.model_args or ""
    if "pretrained=" in model_args:
        raise ConfigError("--lmms-args: name the model with vlmdpo's own --model, not pretrained=")
    return LmmsArguments(found.model, model_args, tuple(rest))


def model_class(model: str, model_type: str, given: LmmsArguments) -> str:
    """The lmms-eval class that runs a model of this type. Raises ConfigError if none is known."""
    name = given.model or MODEL_CLASSES.get(model_type)
    if name is None:
        raise ConfigError(
            f"--model: which of lmms-eval's model classes runs '{model}' ({model_type}) is not "
            "known here; name it, as in --lmms-args '--model huggingface'. List them: "
            "lmms-eval models"
        )
    return name


def check_path(path: str, what: str) -> None:
    """Raise ConfigError for a path that lmms-eval's comma-separated arguments would break."""
    if any(mark in path for mark in ",\"'{}"):
        raise ConfigError(
            f"{what}: lmms-eval cannot be given the path '{path}', which holds a comma, quote or "
            "brace; rename the folder"
        )


def command_line(
    name: str, source: str, device: str, dtype: str | None, given: LmmsArguments
) -> list[str]:
    """The arguments that name a model, and those that users add.

    Args:
        name: the model class.
        source: Hub id, or folder.
        device: as "cpu" or "cuda:0".
        dtype: for classes that take one.
    """
    if Path(source).is_dir():
        source = str(Path(source).absolute())
    model_args = [f"pretrained={source}"]
    keys = {part.partition("=")[0].strip() for part in given.model_args.split(",")}
    if dtype is not None and "dtype" not in keys:
        model_args.append(f"dtype={dtype}")
    # By default it may spread a model over GPUs, and then looks for its inputs on one.
    if device == "cpu" and "device_map" not in keys:
        model_args.append("device_map=cpu")
    if given.model_args:
        model_args.append(given.model_args)
    return [
        *("--model", name, "--model_args", ",".join(model_args)),
        *("--device", device, *given.rest),
    ]


def joined(arguments: Sequence[str]) -> str:
    """A command line as one would type it."""
    return shlex.join(["python", "-m", "lmms_eval", *arguments])
