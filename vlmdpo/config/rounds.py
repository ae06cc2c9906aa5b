"""Options of `vlmdpo rounds`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdpo.config.common import OutputOptions, RuntimeOptions
from vlmdpo.config.options import (
    PER_CALL,
    flag_name,
    option,
    require_at_least,
    require_choice,
)
from vlmdpo.errors import ConfigError

# The stages of a round, as fields: each holds settings of the command of that name.
STAGES = ("make_pairs", "prepare", "train", "eval_amber")
_OF_ALL = {"model", "revision", "trust_remote_code", "overwrite", *PER_CALL}
# What rounds themselves say of a stage.
_OF_ROUNDS = {
    "make_pairs": {"adapter", "output_dir"},
    "prepare": {"dataset", "output_dir"},
    "train": {"adapter", "dataset", "output_dir", "resume", "dry_run", "doctor", "gpu", "lora"},
    "eval_amber": {"adapter", "base", "answers", "output_dir"},
}
BEST_BY = ("hal", "chair", "accuracy")


def _section(command: str) -> Any:
    return option(
        (),
        f"A setting of vlmdpo {command}, as key=value, for every round; repeatable. In a recipe, a "
        f"section {command}: with its keys",
        default_text=f"the defaults of vlmdpo {command}",
        group="Training",
    )


@dataclass(frozen=True, kw_only=True)
class RoundsConfig(RuntimeOptions, OutputOptions):
    """`vlmdpo rounds`: make pairs of the model's own answers, train on them, evaluate, again."""

    input: Path | None = option(
        None,
        "Images and prompts of which each round makes pairs: as --input of vlmdpo make-pairs",
        default_text="embedded scenes",
        group="Data",
    )
    mix_with: str | None = option(
        None,
        "Preference data that is mixed with the pairs of every round: as --dataset of vlmdpo "
        "prepare; its share is set by prepare: mix",
        default_text="none",
        group="Data",
    )
    adapter: Path | None = option(
        None,
        "Folder of a trained LoRA adapter that the first round goes on from; --model defaults to "
        "the base it names",
        default_text="the base model alone",
        group="Model",
    )
    rounds: int = option(3, "Rounds at most", group="Training")
    make_pairs: tuple[str, ...] = _section("make-pairs")
    prepare: tuple[str, ...] = _section("prepare")
    train: tuple[str, ...] = _section("train")
    eval_amber: tuple[str, ...] = _section("eval-amber")
    stop: bool = option(
        True,
        "Stop after a round that does not help: it must raise the accuracy or lower Hal, and Cover "
        "must not fall by more than --max-cover-loss",
        group="Scoring",
    )
    max_cover_loss: float = option(
        3.0,
        "How far Cover may lie below that of the model before round 1, in points",
        group="Scoring",
    )
    best_by: str | None = option(
        None,
        f"Figure by which the best round is chosen: {', '.join(BEST_BY)}",
        default_text="hal, or accuracy where nothing is described",
        group="Scoring",
    )
    output_dir: Path = option(
        Path("outputs/rounds"),
        "Folder for the rounds, rounds.json and report.html; continues where an earlier run "
        "stopped",
        group="Output",
    )
    overwrite: bool = option(False, "Remove the rounds that the folder holds", group="Output")

    def _check(self) -> None:
        require_at_least(self, 1, "rounds", unit="round")
        require_at_least(self, 0, "max_cover_loss", unit="points")
        if self.best_by is not None:
            require_choice(self.best_by, BEST_BY, "best_by")
        if self.mix_with is not None and "," in str(self.output_dir):
            raise ConfigError(
                f"--output-dir: '{self.output_dir}' has a comma, which separates the datasets of "
                "--mix-with; choose another name"
            )
        for stage in STAGES:
            self.settings(stage)

    def settings(self, stage: str) -> dict[str, Any]:
        """A stage's own settings, by key. Raises ConfigError for one that is not for it to say."""
        import yaml

        found: dict[str, Any] = {}
        flag = flag_name(stage)
        for setting in getattr(self, stage):
            key, is_pair, text = setting.partition("=")
            key = key.strip().replace("-", "_")
            if not is_pair or not key:
                raise ConfigError(f"{flag}: cannot read '{setting}'; give key=value")
            if key in _OF_ALL | _OF_ROUNDS[stage] or (stage, key) == ("make_pairs", "input"):
                known = key in vars(self) and key not in _OF_ROUNDS[stage]
                own = f"; give {flag_name(key)} to vlmdpo rounds" if known else ""
                raise ConfigError(f"{flag}: '{key}' is set by the rounds themselves{own}")
            try:
                found[key] = yaml.safe_load(text)
            except yaml.YAMLError as problem:
                raise ConfigError(f"{flag}: cannot read the value of '{setting}'") from problem
        return found
