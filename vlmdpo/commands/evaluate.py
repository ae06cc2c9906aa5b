"""`vlmdpo eval`: any benchmark, or questions of one's own, base beside tuned.

A model's evaluations lie in one folder: a folder per benchmark, and one page over all of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.benchmarks import answers as answer_files
from vlmdpo.benchmarks import registry, summary
from vlmdpo.benchmarks.base import Benchmark, image_names
from vlmdpo.benchmarks.sampling import stratified
from vlmdpo.commands import eval_amber
from vlmdpo.commands.ask_benchmark import Answers, ask_and_report, asked_model, output_folder
from vlmdpo.commands.evaluate_screen import show
from vlmdpo.commands.reporting import (
    how_obtained,
    model_of,
    part_of,
    put_on_card,
    require_answers,
    score_file,
)
from vlmdpo.config import EvalAmberConfig, EvalConfig
from vlmdpo.report import evaluations, figure_rows, model_card

__all__ = ["run", "show"]

_FEW_IMAGES = 30  # below, a bootstrap over images is not to be relied on
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
        evaluations.read_all(config.output_dir, config.include, model_of(config), replaced)
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

    def report_on(settings: EvalConfig, answers: Answers) -> dict[str, Any]:
        return _report(settings, whole, asked, answers)

    def write(settings: EvalConfig, report: dict[str, Any], _: Answers) -> None:
        _write(settings, report)
        _with_page(config, report)

    placed = _in_its_folder(config)
    if config.answers is None:
        return ask_and_report(placed, whole, asked, report_on, write)
    identity = {"answers": str(config.answers), "data_digest": whole.digest}
    identity["benchmark"] = config.kind
    return score_file(placed, whole.read_answers(config.answers), identity, report_on, write)


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
        "image_folder": evaluations.image_folder(evaluations.images_of(common)),
    }


def _limited(config: EvalConfig, whole: Benchmark) -> Benchmark:
    """The part that `--limit` leaves."""

    def part(asked: Any) -> tuple[Any, ...]:
        return tuple(stratified(asked, config.limit, lambda one: (one.group, one.truth)))

    return dataclasses.replace(
        whole, questions=part(whole.questions), descriptions=part(whole.descriptions)
    )


def _report(
    config: EvalConfig, whole: Benchmark, asked: Benchmark, answers: Answers
) -> dict[str, Any]:
    require_answers(config, asked, answers)
    model, adapter = model_of(config)
    report = {
        "benchmark": config.benchmark,
        "title": asked.title,
        "rule": asked.rule,
        "data_digest": asked.digest,
        "model": model,
        "adapter": adapter,
        "part": part_of(asked, whole),
        **summary.summarize(asked, answers.responses, answers.in_own_words),
        "main": list(asked.main),
        "image_folder": evaluations.image_folder(asked.images),
        **how_obtained(config, answers, drawn="images"),
    }
    if report["part"] or report["coverage"] < 1:
        report["published"] = []  # they are of whole runs
    count = len(image_names(asked))
    if count < _FEW_IMAGES:
        report["notes"].append(
            f"{ui.count(count, 'image')} only: intervals over so few are too narrow"
        )
    return report


def _write(config: EvalConfig, report: dict[str, Any]) -> None:
    """The benchmark's own folder: scores.json, report.md, report.html; the adapter's card."""
    folder = output_folder(config)
    answer_files.write_json(folder / evaluations.SCORES, report)
    evaluations.write_pages(folder, [report])
    put_on_card(config, lambda adapter: model_card.keep_evaluation(adapter, report))


def _with_page(config: EvalConfig, report: dict[str, Any]) -> dict[str, Any]:
    """Write the page of all evaluations of the model, and name it in the report."""
    if config.output_dir is not None:
        found = evaluations.read_all(config.output_dir, config.include, model_of(config))
        evaluations.write_pages(config.output_dir, found)
        report["page"] = str(config.output_dir / evaluations.PAGE)
    return report
