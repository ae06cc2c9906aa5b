"""What an option is, how its value is checked, and the options that commands share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vlmdpo.errors import ConfigError, nearest

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")


def option(
    default: Any,
    text: str,
    *,
    default_text: str | None = None,
    flag: str | None = None,
    also: str | None = None,
) -> Any:
    """A dataclass field that is also a command-line option.

    Args:
        default: the value where nobody says otherwise.
        text: the help line, with the unit where there is one.
        default_text: how the help states the default where the value alone would not tell (`None`,
            say).
        flag: the option's spelling where it is not the field's own name.
        also: a second spelling.
    """
    told = {"help": text, "default_text": default_text, "flag": flag, "also": also}
    return dataclasses.field(default=default, metadata=told)


def need(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"{flag_name(name)}: {value!r} is out of range; give {wanted}")


def one_of(value: str, known: Iterable[str], name: str) -> None:
    known = tuple(known)
    if value not in known:
        raise ConfigError(
            f"{flag_name(name)}: unknown value '{value}'.{nearest(value, known)} Known: "
            f"{', '.join(known)}"
        )


def flag_name(field: str) -> str:
    """The spelling of a field on the command line."""
    return "--" + field.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class Base:
    """What every command that loads a model can be told."""

    model: str = option(
        "tiny", "Model: an alias (tiny, idefics2-8b, llava-1.5-7b ...), a Hub id or a local folder"
    )
    revision: str | None = option(
        None, "Branch, tag or commit of a Hub model", default_text="the main branch"
    )
    trust_remote_code: bool = option(False, "Run code that the model's repository ships")
    json: bool = option(False, "Print one JSON object to stdout and nothing else there")
    quiet: bool = option(
        False, "No talk and no progress on stderr: only results, warnings and errors", also="-q"
    )
    yes: bool = option(
        False,
        "Answer yes where it would ask: to replace an earlier result, to upload, to share",
        also="-y",
    )


OF_ONE_CALL = ("json", "quiet", "yes")  # options that belong to a call and not to what it makes

STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")


@dataclass(frozen=True, kw_only=True)
class Processes(Base):
    """What every command that several processes can share is told. Names are accelerate's."""

    num_processes: int = option(
        1, "Processes in all, over all machines, one a GPU; more than 1 start through accelerate"
    )
    num_machines: int = option(
        1, "Machines of the run; the same command runs on each, with its own --machine-rank"
    )
    machine_rank: int = option(0, "This machine's number, counted from 0")
    main_process_ip: str | None = option(
        None, "Address of machine 0", default_text="needed for several machines"
    )
    main_process_port: int | None = option(
        None, "Port of machine 0", default_text="29500 for several machines, else one that is free"
    )

    def __post_init__(self) -> None:
        need(self.num_processes >= 1, "num_processes", self.num_processes, "1 or more")
        need(self.num_machines >= 1, "num_machines", self.num_machines, "1 or more")
        need(
            0 <= self.machine_rank < self.num_machines,
            "machine_rank",
            self.machine_rank,
            "a number below --num-machines",
        )
        if self.num_processes % self.num_machines:
            raise ConfigError(
                f"--num-processes {self.num_processes} counts over all machines, and "
                f"{self.num_machines} do not share them "
                "evenly"
            )
        if self.num_machines > 1 and self.main_process_ip is None:
            raise ConfigError("--num-machines needs --main-process-ip, the address of machine 0")


@dataclass(frozen=True, kw_only=True)
class Weights(Base):
    """What every command that runs a model can be told."""

    dtype: str = option(
        "auto",
        f"Data type of the base weights: {', '.join(DTYPES)}; auto is bfloat16 on a GPU that has "
        "it",
    )
    attn_implementation: str = option(
        "auto",
        f"Attention: {', '.join(ATTENTIONS)}; auto is flash_attention_2 where its package and a "
        "GPU are, else sdpa",
    )
    device: str = option("auto", "Where to compute: auto, cpu, cuda, cuda:1, mps")
    image_splitting: bool = option(
        False, "Let Idefics-like processors cut each image into tiles (5 times the image tokens)"
    )

    def __post_init__(self) -> None:
        one_of(self.dtype, DTYPES, "dtype")
        one_of(self.attn_implementation, ATTENTIONS, "attn_implementation")
