"""`vlmdpo eval-amber`: both tasks of AMBER, scored as AMBER scores them, with their uncertainty."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from vlmdpo import ui
from vlmdpo.benchmarks import answers as answer_files
from vlmdpo.benchmarks import registry
from vlmdpo.benchmarks.amber import benchmark as amber
from vlmdpo.benchmarks.amber.benchmark import Amber
from vlmdpo.benchmarks.amber.scores import COVERS
from vlmdpo.benchmarks.amber.summary import summarize
from vlmdpo.benchmarks.base import ids
from vlmdpo.benchmarks.image_folder import DrawnImages
from vlmdpo.benchmarks.sampling import SEED, stratified
from vlmdpo.benchmarks.stats import DRAWS
from vlmdpo.commands.ask_benchmark import (
    Answers,
    ask_and_report,
    asked_model,
    check_output,
    output_folder,
)
from vlmdpo.commands.eval_amber_screen import PAGE, show
from vlmdpo.config import PER_CALL, EvalAmberConfig, recipes
from vlmdpo.errors import DataError
from vlmdpo.report import amber_page, model_card

__all__ = ["run", "show"]

SCORES, MARKDOWN = "scores.json", "report.md"


def run(config: EvalAmberConfig) -> dict[str, Any]:
    """Ask and score, or score a response file.

    Raises ConfigError, DataError, ModelError, MissingDependencyError.
    """
    return evaluate(config, extend=lambda report, _: report, also_write=lambda report: report)


def evaluate(
    config: EvalAmberConfig,
    extend: Callable[[dict[str, Any], Answers], dict[str, Any]],
    also_write: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """See `run`.

    Args:
        extend: called with the report and the answers; returns the report that is written.
        also_write: called with the report, in the process that has written it.
    """
    whole = _benchmark(config)
    asked = _select(config, whole)
    if config.answers is not None:
        return also_write(_score_file(config, config.answers, whole, asked, extend))
    if asked.descriptions and config.extractor == "official":
        asked.extractor()  # fails now rather than after an hour of asking
    if config.output_dir is None:
        folder = Path("outputs") / "amber" / f"{whole.title}-{asked_model(config)}"
        config = dataclasses.replace(config, output_dir=folder)

    def report_on(settings: EvalAmberConfig, answers: Answers) -> dict[str, Any]:
        return extend(_report(settings, whole, asked, answers), answers)

    def write(settings: EvalAmberConfig, report: dict[str, Any], answers: Answers) -> None:
        _write(settings, asked, report, answers)
        _update_model_card(settings, report)
        also_write(report)

    return ask_and_report(config, whole, asked, report_on, write)


def _benchmark(config: EvalAmberConfig) -> Amber:
    """All of the data; the embedded set's images are drawn."""
    if config.data is not None:
        return cast("Amber", registry.load("amber", config))
    from vlmdpo.tiny import evaluation

    embedded = amber.read(evaluation.FOLDER, extractor=config.extractor, strict=config.strict)
    return dataclasses.replace(embedded, title="scenes", images=DrawnImages(evaluation.draw_image))


def _select(config: EvalAmberConfig, whole: Amber) -> Amber:
    """The part that is asked, by `--task`, `--dimension` and `--limit`."""
    dimensions = {d for name in config.dimension for d in COVERS[name.capitalize()]}
    wanted = [q for q in whole.questions if not dimensions or q.dimension in dimensions]
    selected = tuple(stratified(wanted, config.limit, lambda q: (q.dimension, q.truth)))
    descriptions = tuple(stratified(whole.descriptions, config.limit, lambda _: None))
    if config.task == "generative":
        selected = ()
    if config.task == "discriminative" or config.dimension:
        descriptions = ()
    is_amber = whole.is_amber and len(selected) == len(whole.questions)
    return dataclasses.replace(
        whole, questions=selected, descriptions=descriptions, is_amber=is_amber
    )


def _score_file(
    config: EvalAmberConfig,
    path: Path,
    whole: Amber,
    asked: Amber,
    extend: Callable[[dict[str, Any], Answers], dict[str, Any]],
) -> dict[str, Any]:
    """Score `--answers` as it stands."""
    responses = whole.read_answers(path)
    identity = {"answers": str(path), "data_digest": asked.digest}
    if config.output_dir is not None:
        check_output(config)
        answer_files.check(config.output_dir, identity)
    known = ids(whole) | whole.other_ids
    for number, _ in responses:
        if number not in known:
            raise DataError(
                f"'{path}': there is no question {number} in {whole.title}; is --data the right "
                "folder?"
            )
    answers = Answers({"base": responses}, {"base": dict(responses)}, {})
    report = extend(_report(config, whole, asked, answers), answers)
    if config.output_dir is not None:
        answer_files.create(config.output_dir)
        answer_files.write_json(config.output_dir / answer_files.RUN, identity)
        _write(config, asked, report, answers)
    return report


def _report(
    config: EvalAmberConfig, whole: Amber, asked: Amber, answers: Answers
) -> dict[str, Any]:
    answered = {number for by_id in answers.responses.values() for number, _ in by_id}
    if not answered & ids(asked):
        who = f"'{config.answers}' answers" if config.answers is not None else "the model answered"
        raise DataError(f"{who} none of the questions of {asked.title}")
    names = ("vlmdpo", "torch", "transformers", "peft")
    return {
        "data": asked.title,
        "is_amber": asked.is_amber,
        "part": _part(config, whole, asked),
        "model": config.model if config.answers is None else str(config.answers),
        "adapter": str(config.adapter) if config.adapter else None,
        **summarize(asked, answers.responses, answers.in_own_words),
        "engine": None,
        "fallback_reason": None,
        "bad_pictures": {},
        "bad_questions": {},
        **answers.facts,
        "settings": recipes.plain(config, without=(*PER_CALL, "overwrite")),
        "bootstrap": {"draws": DRAWS, "seed": 0, "over": "pictures"},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in names},
        },
        **({"output_dir": str(config.output_dir)} if config.output_dir else {}),
    }


def _part(config: EvalAmberConfig, whole: Amber, asked: Amber) -> dict[str, int] | None:
    """How much of the data `--limit` left, or None if it left all."""
    everything = _select(dataclasses.replace(config, limit=None), whole)
    if all(
        len(part) == len(of)
        for part, of in (
            (asked.questions, everything.questions),
            (asked.descriptions, everything.descriptions),
        )
    ):
        return None
    return {
        "questions": len(asked.questions),
        "of_questions": len(everything.questions),
        "descriptions": len(asked.descriptions),
        "of_descriptions": len(everything.descriptions),
        "seed": SEED,
    }


def _write(config: EvalAmberConfig, asked: Amber, report: dict[str, Any], answers: Answers) -> None:
    """scores.json, report.md and report.html."""
    folder = output_folder(config)
    answer_files.write_json(folder / SCORES, report)
    answer_files.write_text(folder / MARKDOWN, amber_page.markdown(report))
    answer_files.write_text(folder / PAGE, amber_page.page(report, asked, answers.in_own_words))


def _update_model_card(config: EvalAmberConfig, report: dict[str, Any]) -> None:
    """Put the scores on the adapter's card. A folder that cannot be written gets a warning."""
    if config.adapter is None or config.limit is not None:
        return  # a part of the questions says too little for a card
    try:
        model_card.keep_amber(config.adapter, report)
    except OSError as problem:
        ui.warn(
            f"the scores are not on the adapter's card: cannot write '{config.adapter}': "
            f"{problem.strerror}"
        )
