"""`vlmdpo eval`: any benchmark, or questions of one's own, base beside tuned.

A model's evaluations lie in one folder: a folder per benchmark, and one page over all of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.benchmarks import answers as answer_files
from vlmdpo.benchmarks import registry, summary
from vlmdpo.benchmarks.base import Benchmark, everything_asked, ids
from vlmdpo.benchmarks.sampling import SEED, stratified
from vlmdpo.benchmarks.stats import DRAWS
from vlmdpo.commands import eval_amber
from vlmdpo.commands.ask_benchmark import (
    Answers,
    ask_and_report,
    asked_model,
    check_output,
    output_folder,
)
from vlmdpo.commands.evaluate_screen import show
from vlmdpo.config import PER_CALL, EvalAmberConfig, EvalConfig, recipes
from vlmdpo.errors import DataError
from vlmdpo.report import evaluations, figure_rows, model_card

__all__ = ["run", "show"]

_MAX_NAME = 80  # characters of a folder's name


def run(config: EvalConfig) -> dict[str, Any]:
    """Ask and score one benchmark, or score a response file, and write the page of all.

    Raises ConfigError, DataError, ModelError, MissingDependencyError.
    """
    if config.output_dir is None and config.answers is None:
        config = dataclasses.replace(
            config, output_dir=Path("outputs") / "eval" / asked_model(config)
        )
    if config.output_dir is not None:
        # Said before an hour of asking.
        replaced = _in_its_folder(config).output_dir if config.overwrite else None
        evaluations.read_all(config.output_dir, config.include, _model_of(config), replaced)
    if config.kind == "lmms":
        from vlmdpo.commands import evaluate_lmms

        placed = _in_its_folder(config)
        report = evaluate_lmms.run(placed)
        _write(placed, report)
        return _with_page(config, report)
    if config.kind == "amber":
        return eval_amber.evaluate(
            _as_amber(config), extend=_extended_amber, also_write=lambda r: _with_page(config, r)
        )
    whole = registry.load(config.kind, config)
    asked = _limited(config, whole)
    if config.answers is not None:
        return _score_file(config, config.answers, whole, asked)

    def report_on(settings: EvalConfig, answers: Answers) -> dict[str, Any]:
        return _report(settings, whole, asked, answers)

    def write(settings: EvalConfig, report: dict[str, Any], _: Answers) -> None:
        _write(settings, report)
        _with_page(config, report)

    return ask_and_report(_in_its_folder(config), whole, asked, report_on, write)


def _model_of(config: EvalConfig) -> tuple[str, str | None]:
    """What is evaluated, as reports name it: the model (or file of answers) and its adapter."""
    model = config.model if config.answers is None else str(config.answers)
    return model, str(config.adapter) if config.adapter else None


def _in_its_folder(config: EvalConfig) -> EvalConfig:
    """The config with the benchmark's own folder inside the model's."""
    if config.output_dir is None:
        return config
    own = Path(config.benchmark).stem if config.kind == "a file" else config.benchmark
    name = re.sub(r"[^\w.-]+", "-", own).strip("-.") or "questions"
    if len(name) > _MAX_NAME:  # lmms-eval may be given many tasks
        name = f"{name[:_MAX_NAME]}-{hashlib.sha256(own.encode()).hexdigest()[:8]}"
    return dataclasses.replace(config, output_dir=config.output_dir / name)


def _as_amber(config: EvalConfig) -> EvalAmberConfig:
    """The same settings as `vlmdpo eval-amber` has them."""
    placed = _in_its_folder(config)
    names = [field.name for field in dataclasses.fields(EvalAmberConfig)]
    return EvalAmberConfig(**{name: getattr(placed, name) for name in names})


def _extended_amber(report: dict[str, Any], answers: Answers) -> dict[str, Any]:
    """AMBER's report with the keys that every benchmark's has besides."""
    common = figure_rows.in_common_form(report)
    told = {
        role: {
            "words": summary.mean([len(text.split()) for _, text in given]),
            "repetition": summary.mean([summary.repetition(text) for _, text in given]),
        }
        for role, given in answers.responses.items()
    }
    return {
        **report,
        **{name: common[name] for name in ("benchmark", "title", "rule", "unread", "notes")},
        "models": {role: {**facts, **told[role]} for role, facts in report["models"].items()},
    }


def _limited(config: EvalConfig, whole: Benchmark) -> Benchmark:
    """The part that `--limit` leaves."""

    def part(asked: Any) -> tuple[Any, ...]:
        return tuple(stratified(asked, config.limit, lambda one: (one.group, one.truth)))

    return dataclasses.replace(
        whole, questions=part(whole.questions), descriptions=part(whole.descriptions)
    )


def _score_file(
    config: EvalConfig, path: Path, whole: Benchmark, asked: Benchmark
) -> dict[str, Any]:
    """Score `--answers` as it stands."""
    responses = whole.read_answers(path)
    answers = Answers({"base": responses}, {"base": dict(responses)}, {})
    placed = _in_its_folder(config)
    if placed.output_dir is None:
        return _report(config, whole, asked, answers)
    identity = {"answers": str(path), "data_digest": whole.digest, "benchmark": config.kind}
    check_output(placed)
    answer_files.check(placed.output_dir, identity)
    report = _report(placed, whole, asked, answers)
    answer_files.create(placed.output_dir)
    answer_files.write_json(placed.output_dir / answer_files.RUN, identity)
    _write(placed, report)
    return _with_page(config, report)


def _report(
    config: EvalConfig, whole: Benchmark, asked: Benchmark, answers: Answers
) -> dict[str, Any]:
    answered = {number for given in answers.responses.values() for number, _ in given}
    if not answered & ids(asked):
        who = f"'{config.answers}' answers" if config.answers is not None else "the model answered"
        raise DataError(f"{who} none of the questions of {asked.title}")
    model, adapter = _model_of(config)
    names = ("vlmdpo", "torch", "transformers", "peft")
    whole_run = len(everything_asked(asked)) == len(everything_asked(whole))
    report = {
        "benchmark": config.benchmark,
        "title": asked.title,
        "rule": asked.rule,
        "data_digest": asked.digest,
        "model": model,
        "adapter": adapter,
        "part": None if whole_run else _part(whole, asked),
        **summary.summarize(asked, answers.responses, answers.in_own_words),
        "main": list(asked.main),
        "engine": None,
        "fallback_reason": None,
        "bad_pictures": {},
        "bad_questions": {},
        **answers.facts,
        "settings": recipes.plain(config, without=(*PER_CALL, "overwrite")),
        "bootstrap": {"draws": DRAWS, "seed": 0, "over": "images"},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in names},
        },
        **({"output_dir": str(config.output_dir)} if config.output_dir else {}),
    }
    if not whole_run or report["coverage"] < 1:
        report["published"] = []  # they are of whole runs
    return report


def _part(whole: Benchmark, asked: Benchmark) -> dict[str, int]:
    """How much of the data `--limit` left."""
    return {
        "questions": len(asked.questions),
        "of_questions": len(whole.questions),
        "descriptions": len(asked.descriptions),
        "of_descriptions": len(whole.descriptions),
        "seed": SEED,
    }


def _write(config: EvalConfig, report: dict[str, Any]) -> None:
    """The benchmark's own folder: scores.json, report.md and report.html."""
    folder = output_folder(config)
    answer_files.write_json(folder / evaluations.SCORES, report)
    evaluations.write_pages(folder, [report])
    if config.adapter is None or config.limit is not None:
        return  # a part of the questions says too little for a card
    try:
        model_card.keep_evaluation(config.adapter, report)
    except OSError as problem:
        ui.warn(
            f"the scores are not on the adapter's card: cannot write '{config.adapter}': "
            f"{problem.strerror}"
        )
    except DataError as problem:
        ui.warn(f"the scores are not on the adapter's card: {problem}")


def _with_page(config: EvalConfig, report: dict[str, Any]) -> dict[str, Any]:
    """Write the page of all evaluations of the model, and name it in the report."""
    if config.output_dir is not None:
        found = evaluations.read_all(config.output_dir, config.include, _model_of(config))
        evaluations.write_pages(config.output_dir, found)
        report["page"] = str(config.output_dir / evaluations.PAGE)
    return report
