"""`vlmdpo eval-amber`: both tasks of AMBER, scored as AMBER scores them, with their uncertainty."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from vlmdpo.benchmarks import answers as answer_files
from vlmdpo.benchmarks import registry
from vlmdpo.benchmarks.amber import benchmark as amber
from vlmdpo.benchmarks.amber.benchmark import Amber
from vlmdpo.benchmarks.amber.scores import COVERS
from vlmdpo.benchmarks.amber.summary import summarize
from vlmdpo.benchmarks.base import Responses, ids
from vlmdpo.benchmarks.image_folder import DrawnImages
from vlmdpo.benchmarks.sampling import stratified
from vlmdpo.commands.ask_benchmark import Answers, ask_and_report, asked_model, output_folder
from vlmdpo.commands.eval_amber_screen import PAGE, show
from vlmdpo.commands.reporting import (
    how_obtained,
    model_of,
    part_of,
    put_on_card,
    require_answers,
    score_file,
)
from vlmdpo.config import EvalAmberConfig
from vlmdpo.errors import DataError
from vlmdpo.report import amber_page, model_card

__all__ = ["run", "show"]

SCORES, MARKDOWN = "scores.json", "report.md"


def run(config: EvalAmberConfig) -> dict[str, Any]:
    """Ask and score, or score a response file.

    Raises ConfigError, DataError, ModelError, MissingDependencyError.
    """
    return evaluate(config, extend=lambda report, _: report, also_write=lambda report: None)


def evaluate(
    config: EvalAmberConfig,
    extend: Callable[[dict[str, Any], Answers], dict[str, Any]],
    also_write: Callable[[dict[str, Any]], object],
) -> dict[str, Any]:
    """See `run`.

    Args:
        extend: called with the report and the answers; returns the report that is written.
        also_write: called with the report, in the process that has written it.
    """
    whole = _benchmark(config)
    asked = _select(config, whole)

    def report_on(settings: EvalAmberConfig, answers: Answers) -> dict[str, Any]:
        return extend(_report(settings, whole, asked, answers), answers)

    def write(settings: EvalAmberConfig, report: dict[str, Any], answers: Answers) -> None:
        _write(settings, asked, report, answers)
        also_write(report)

    if config.answers is not None:
        responses = _responses(config.answers, whole)
        identity = {"answers": str(config.answers), "data_digest": asked.digest}
        return score_file(config, responses, identity, report_on, write)
    if asked.descriptions and config.extractor == "official":
        asked.extractor()  # fails now rather than after an hour of asking
    if config.output_dir is None:
        folder = Path("outputs") / "amber" / f"{whole.title}-{asked_model(config)}"
        config = dataclasses.replace(config, output_dir=folder)
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


def _responses(path: Path, whole: Amber) -> Responses:
    """The responses of `--answers`. Raises DataError for an id that the data do not have."""
    responses = whole.read_answers(path)
    known = ids(whole) | whole.other_ids
    for number, _ in responses:
        if number not in known:
            raise DataError(
                f"'{path}': there is no question {number} in {whole.title}; is --data the right "
                "folder?"
            )
    return responses


def _report(
    config: EvalAmberConfig, whole: Amber, asked: Amber, answers: Answers
) -> dict[str, Any]:
    require_answers(config, asked, answers)
    model, adapter = model_of(config)
    everything = _select(dataclasses.replace(config, limit=None), whole)
    return {
        "data": asked.title,
        "is_amber": asked.is_amber,
        "part": part_of(asked, everything),
        "model": model,
        "adapter": adapter,
        **summarize(asked, answers.responses, answers.in_own_words),
        **how_obtained(config, answers, drawn="pictures"),
    }


def _write(config: EvalAmberConfig, asked: Amber, report: dict[str, Any], answers: Answers) -> None:
    """scores.json, report.md and report.html; with an adapter, the scores on its card."""
    folder = output_folder(config)
    answer_files.write_json(folder / SCORES, report)
    answer_files.write_text(folder / MARKDOWN, amber_page.markdown(report))
    answer_files.write_text(folder / PAGE, amber_page.page(report, asked, answers.in_own_words))
    put_on_card(config, lambda adapter: model_card.keep_amber(adapter, report))
