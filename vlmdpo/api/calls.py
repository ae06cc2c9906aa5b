"""Commands as functions: options in as keyword arguments, the report out as a dictionary.

They print what the commands print to stderr (`quiet=True` leaves only warnings), nothing to stdout,
and never ask.
"""

from __future__ import annotations

import importlib
from typing import Any, TypeVar

from vlmdpo import ui
from vlmdpo.commands.table import COMMANDS
from vlmdpo.config import EstimateMemoryConfig, EvalAmberConfig, EvalConfig, PrepareConfig
from vlmdpo.errors import (
    ConfigError,
    MemoryBudgetError,
    is_out_of_memory,
    out_of_memory_reason,
)
from vlmdpo.models.option_layers import config_of

Config = TypeVar("Config", PrepareConfig, EstimateMemoryConfig, EvalAmberConfig, EvalConfig)


def prepare(config: PrepareConfig | None = None, /, **options: Any) -> dict[str, Any]:
    """Turn preference data into a checked dataset, as `vlmdpo prepare` does.

    Args:
        config: all options; None to give them by keyword.
        options: fields of `PrepareConfig`, such as dataset="rlaif-v", output_dir="data".

    Returns the report of `--json`: `path` (the folder, for `vlmdpo train` and `load_from_disk`),
    `rows_in`, `rows_out`, `dropped` {reason: count}, `distinct` {`images`, `prompts`,
    `pairs_per_prompt`}, `bytes`, `reused` (a finished result was found), and more.

    Raises:
        ConfigError: an unknown option, or a value out of range.
        DataError: an unreadable source, no usable row, a full disk, a folder that holds something
            else and would be replaced without `overwrite=True`.
        ModelError: the processor of `model` cannot be loaded.
    """
    return _run("prepare", PrepareConfig, config, options)


def estimate(config: EstimateMemoryConfig | None = None, /, **options: Any) -> dict[str, Any]:
    """Forecast the memory of a training run, as `vlmdpo estimate-memory` does.

    Args:
        config: all options; None to give them by keyword.
        options: fields of `EstimateMemoryConfig`, such as model="llava-1.5-7b", lora=True,
            gpu="a100-80gb", fast=True.

    Returns the report of `--json`: `peak_bytes`, `components` [{`name`, `bytes`, `formula`}],
    `total_bytes`, `parameters` {`total`, `trainable`, `by_part`}, with `gpu` also `verdict`, and
    more.

    Raises ConfigError, DataError (`dataset`), ModelError.
    """
    return _run("estimate-memory", EstimateMemoryConfig, config, options)


def evaluate(
    config: EvalAmberConfig | EvalConfig | None = None, /, **options: Any
) -> dict[str, Any]:
    """Ask and score AMBER's questions, as `vlmdpo eval-amber` does, or, with `benchmark`, those of
    any benchmark, as `vlmdpo eval` does. In this process.

    Args:
        config: all options, an `EvalConfig` for any benchmark; None to give them by keyword.
        options: fields of `EvalAmberConfig`, such as model="llava-1.5-7b", adapter="adapter",
            data="AMBER/data", limit=200; with benchmark="pope" or another, of `EvalConfig`.

    Returns the report of `--json`. Of `eval`: `scores` {`base` and/or `tuned`: {split or `all`:
    {figure: value}}}, `intervals` with the same keys, `coverage`, `unread`, `comparison`. Of
    `eval-amber`: `scores` {`base` and/or `tuned`: {dimension: {`accuracy`,
    `precision`, `recall`, `f1`}, `Generative`: {`chair`, `cover`, `hal`, `cog`}}}, `coverage`,
    `unparsed`, with base and tuned also `comparison` {`delta_accuracy`, `ci95`, `mcnemar_p`}.

    Raises ConfigError (also for more than one process), DataError, ModelError, MemoryBudgetError,
    MissingDependencyError.
    """
    if isinstance(config, EvalConfig) or "benchmark" in options:
        return _run("eval", EvalConfig, config, options)
    return _run("eval-amber", EvalAmberConfig, config, options)


def _run(
    command: str, cls: type[Config], config: Config | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The report of a command, with options in the layers of the command line."""
    if config is not None and options:
        raise ConfigError("give a config or options by keyword, not both")
    if config is None:
        given = {name: value for name, value in options.items() if value is not None}
        config = config_of(cls, command, given)
    if config.json:
        raise ConfigError("json: the report is what this function returns; leave it out")
    if getattr(config, "num_processes", 1) > 1:
        raise ConfigError(
            "num_processes: a function runs in the process that calls it; use the command line, or "
            "start the script with accelerate launch"
        )
    module = importlib.import_module(COMMANDS[command].module)
    with ui.unattended(quiet=config.quiet, yes=config.yes):
        try:
            report: dict[str, Any] = module.run(config)
        except (RuntimeError, MemoryError, OSError) as problem:
            if not is_out_of_memory(problem):
                raise
            reason = out_of_memory_reason(problem)
            raise MemoryBudgetError(f"out of memory: {reason}") from problem
    return report
