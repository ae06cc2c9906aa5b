"""What the reports of `vlmdpo eval` and `vlmdpo eval-amber` share."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from vlmdpo import ui
from vlmdpo.benchmarks import answers as answer_files
from vlmdpo.benchmarks.base import Benchmark, Id, Responses, ids
from vlmdpo.benchmarks.sampling import SEED
from vlmdpo.benchmarks.stats import DRAWS
from vlmdpo.commands.ask_benchmark import Answers, check_output
from vlmdpo.config import PER_CALL, EvalAmberConfig, recipes
from vlmdpo.errors import DataError

_LIBRARIES = ("vlmdpo", "torch", "transformers", "peft")

Config = TypeVar("Config", bound=EvalAmberConfig)


def model_of(config: EvalAmberConfig) -> tuple[str, str | None]:
    """What is evaluated, as reports name it: the model (or file of answers) and its adapter."""
    model = config.model if config.answers is None else str(config.answers)
    return model, str(config.adapter) if config.adapter else None


def require_answers(config: EvalAmberConfig, asked: Benchmark, answers: Answers) -> None:
    """Raise DataError if nothing that was asked is answered."""
    answered = {number for given in answers.responses.values() for number, _ in given}
    if not answered & ids(asked):
        who = f"'{config.answers}' answers" if config.answers is not None else "the model answered"
        raise DataError(f"{who} none of the questions of {asked.title}")


def part_of(asked: Benchmark, everything: Benchmark) -> dict[str, int] | None:
    """How much of the data `--limit` left, or None if it left all."""
    counts = {
        name: (len(getattr(asked, name)), len(getattr(everything, name)))
        for name in ("questions", "descriptions")
    }
    if all(part == whole for part, whole in counts.values()):
        return None
    parts = {name: part for name, (part, _) in counts.items()}
    return {**parts, **{f"of_{name}": whole for name, (_, whole) in counts.items()}, "seed": SEED}


def how_obtained(config: EvalAmberConfig, answers: Answers, *, drawn: str) -> dict[str, Any]:
    """Engine, settings, versions and folder of an evaluation.

    Args:
        drawn: what the bootstrap draws, in words.
    """
    return {
        "engine": None,
        "fallback_reason": None,
        "bad_pictures": {},
        "bad_questions": {},
        **answers.facts,
        "settings": recipes.plain(config, without=(*PER_CALL, "overwrite")),
        "bootstrap": {"draws": DRAWS, "seed": 0, "over": drawn},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
        **({"output_dir": str(config.output_dir)} if config.output_dir else {}),
    }


def score_file(
    config: Config,
    responses: Responses,
    identity: Mapping[str, Any],
    report_on: Callable[[Config, Answers], dict[str, Any]],
    write: Callable[[Config, dict[str, Any], Answers], None],
) -> dict[str, Any]:
    """Score the responses of `--answers` as they stand, and write what there is a folder for.

    Args:
        identity: what the folder's content depends on; that of another is refused.
        report_on, write: as in `ask_and_report`.

    Raises DataError.
    """
    if config.output_dir is not None:
        check_output(config)
        answer_files.check(config.output_dir, identity)
    said: dict[Id, str] = dict(responses)
    answers = Answers({"base": responses}, {"base": said}, {})
    report = report_on(config, answers)
    if config.output_dir is not None:
        answer_files.create(config.output_dir)
        answer_files.write_json(config.output_dir / answer_files.RUN, dict(identity))
        write(config, report, answers)
    return report


def put_on_card(config: EvalAmberConfig, keep: Callable[[Path], object]) -> None:
    """Put figures on the adapter's card. One that cannot be written or read gets a warning.

    Args:
        keep: called with the adapter's folder; may raise OSError, and DataError for a damaged card.
    """
    if config.adapter is None or config.limit is not None:
        return  # a part of the questions says too little for a card
    try:
        keep(config.adapter)
    except OSError as problem:
        ui.warn(
            f"the scores are not on the adapter's card: cannot write '{config.adapter}': "
            f"{problem.strerror}"
        )
    except DataError as problem:
        ui.warn(f"the scores are not on the adapter's card: {problem}")
