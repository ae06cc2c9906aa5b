"""The stages of a round of `vlmdpo rounds`: folders, configs, and what is kept of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from vlmdpo import config as cf
from vlmdpo.commands.train_folder import RECIPE
from vlmdpo.config import RoundsConfig, flag_name
from vlmdpo.config.common import RuntimeOptions
from vlmdpo.data import store
from vlmdpo.errors import ConfigError
from vlmdpo.models.adapter_files import CONFIG, WEIGHTS
from vlmdpo.models.option_layers import config_of
from vlmdpo.report.rounds_page import figures_of

_FOLDERS = {"make_pairs": "pairs", "prepare": "data", "train": "adapter", "eval_amber": "eval"}
# Files by which a finished stage is known to be still there.
_RESULTS = {
    "make_pairs": ("pairs.jsonl",),
    "prepare": (store.MANIFEST,),
    "train": (CONFIG, WEIGHTS),
    "eval_amber": ("scores.json",),
}
_CONFIGS: dict[str, type[cf.Options]] = {
    "make_pairs": cf.MakePairsConfig,
    "prepare": cf.PrepareConfig,
    "train": cf.TrainConfig,
    "eval_amber": cf.EvalAmberConfig,
}
# What is kept of a stage's report.
_KEPT = {
    "make_pairs": (
        *("prompts", "samples", "pairs", "skipped", "judge", "mean_length", "judge_agreement"),
    ),
    "prepare": ("rows_in", "rows_out", "dropped"),
    "train": (
        *("steps", "loss", "rewards/accuracies", "rewards/margins", "learning_rate", "engine"),
    ),
    "eval_amber": ("data", "is_amber", "coverage", "unparsed"),
}


def folder_of(rounds: Path, number: int, stage: str) -> Path:
    """Where a stage of a round writes; round 0 is the evaluation before the first one."""
    return rounds / f"round-{number}" / _FOLDERS[stage]


def missing_result(rounds: Path, number: int, stage: str) -> Path | None:
    """A file of a finished stage that is gone, or None."""
    folder = folder_of(rounds, number, stage)
    return next((folder / n for n in _RESULTS[stage] if not (folder / n).is_file()), None)


def stage_config(config: RoundsConfig, stage: str, number: int) -> Any:
    """The config of a stage's command. Raises ConfigError, naming the section."""
    cls = _CONFIGS[stage]
    section = config.settings(stage)
    own = _set_by_rounds(config, stage, number)
    try:
        built = config_of(cls, stage.replace("_", "-"), _shared(config, cls), section, own)
    except ConfigError as problem:
        raise ConfigError(f"{flag_name(stage)}: {problem}") from problem
    if isinstance(built, cf.MakePairsConfig):
        # Other draws in each round, also where a round changed little.
        return replace(built, seed=built.seed + number - 1)
    return built


def _shared(config: RoundsConfig, cls: type[cf.Options]) -> dict[str, Any]:
    """The options that rounds and a stage have in common, where they are not the defaults."""
    known = {field.name for field in fields(cls)}
    return {
        field.name: getattr(config, field.name)
        for field in fields(RuntimeOptions)
        if field.name in known and getattr(config, field.name) != field.default
    }


def _set_by_rounds(config: RoundsConfig, stage: str, number: int) -> dict[str, Any]:
    """What follows from the place of a stage among the others."""
    out = config.output_dir
    folder = folder_of(out, number, stage)
    before = config.adapter if number <= 1 else folder_of(out, number - 1, "train")
    own: dict[str, Any] = {"model": config.model, "output_dir": folder, "quiet": config.quiet}
    own["yes"] = config.yes
    if stage == "make_pairs":
        own |= {"input": config.input, "adapter": before}
    elif stage == "prepare":
        pairs = str(folder_of(out, number, "make_pairs") / _RESULTS["make_pairs"][0])
        own["dataset"] = f"{pairs},{config.mix_with}" if config.mix_with else pairs
    elif stage == "train":
        is_begun = (folder / RECIPE).is_file()
        data = folder_of(out, number, "prepare")
        own |= {"dataset": str(data), "adapter": before, "resume": is_begun}
    else:
        adapter = folder_of(out, number, "train") if number else config.adapter
        own |= {"adapter": adapter, "base": adapter is None}
    return {key: value for key, value in own.items() if value is not None}


def outcome_of(stage: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a stage's report."""
    outcome = {name: report.get(name) for name in _KEPT[stage]}
    if stage == "eval_amber":
        outcome["figures"] = figures_of(report)
    return outcome
