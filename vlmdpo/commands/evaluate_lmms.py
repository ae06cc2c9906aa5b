"""`vlmdpo eval --benchmark lmms:TASK`: general ability before and after tuning, by lmms-eval.

lmms-eval asks base and then tuned, each in a process of its own, and scores by its own rules; its
figures are put into vlmdpo's report, and paired by document where it logs samples.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.benchmarks import answers as answer_files
from vlmdpo.benchmarks import lmms, lmms_process
from vlmdpo.benchmarks.lmms import TaskResult
from vlmdpo.benchmarks.lmms_arguments import (
    TAKES_DTYPE,
    LmmsArguments,
    check_path,
    command_line,
    joined,
    model_class,
    parse,
)
from vlmdpo.benchmarks.summary import repetition
from vlmdpo.commands.ask_benchmark import Answers, output_folder
from vlmdpo.commands.reporting import how_obtained, model_of
from vlmdpo.config import EvalConfig, ExportConfig, flag_name
from vlmdpo.config.evaluate import LMMS
from vlmdpo.errors import ConfigError, DataError

# Options of asking, which lmms-eval does in its own way.
_NOT_READ = (
    *("data", "images", "system", "chat_template_kwargs", "image_splitting", "engine"),
    *("batch_size", "verify", "max_new_tokens", "max_description_tokens", "attn_implementation"),
    *("trust_remote_code", "revision"),
)


_UNIT = "as lmms-eval gives it"
# A figure's own interval does not come from a bootstrap.
_OVER = "images, of changes; of figures ± 1.96 of lmms-eval's standard errors"


@dataclass(frozen=True)
class _Plan:
    """What is run: known, and found to be possible, before anything is loaded."""

    tasks: tuple[str, ...]
    roles: tuple[str, ...]
    folder: Path
    given: LmmsArguments
    model_class: str
    source: str  # of the base model
    device: str
    dtype: str | None  # for model classes that take one
    identity: Mapping[str, Any]

    def arguments(self, source: str, limit: int | None) -> list[str]:
        limited = ["--limit", str(limit)] if limit is not None else []
        named = command_line(self.model_class, source, self.device, self.dtype, self.given)
        return [*named, "--tasks", ",".join(self.tasks), "--log_samples", *limited]


def run(config: EvalConfig) -> dict[str, Any]:
    """Have lmms-eval ask base and tuned, and report. What is finished is not run again.

    Args:
        config: with the output folder of these tasks.

    Raises ConfigError, DataError, ModelError, MissingDependencyError, MemoryBudgetError, Preempted.
    """
    installed = lmms_process.installed_version()
    plan = _plan(config, installed)
    if config.overwrite:
        answer_files.clear(plan.folder)
    answer_files.check(plan.folder, plan.identity)
    todo = [role for role in plan.roles if lmms.results_file(plan.folder / role) is None]
    if todo:
        ui.step("ask lmms-eval for its tasks")
        lmms_process.check_tasks(plan.tasks, plan.given.rest)
    answer_files.create(plan.folder)
    answer_files.write_json(plan.folder / answer_files.RUN, dict(plan.identity))
    if "base" in todo:
        _answer(config, plan, "base", plan.source)
    if "tuned" in todo:
        _answer_tuned(config, plan)
    return _report(config, plan, {role: lmms.read(plan.folder / role) for role in plan.roles})


def _plan(config: EvalConfig, installed: str) -> _Plan:
    """Raises ConfigError, ModelError."""
    from vlmdpo.models import digest, load
    from vlmdpo.models.adapter_files import WEIGHTS, check_adapter
    from vlmdpo.models.devices import pick_device

    tasks = tuple(part.strip() for part in config.benchmark.removeprefix(LMMS).split(","))
    if not all(tasks):
        raise ConfigError(f"--benchmark: name tasks of lmms-eval, as in {LMMS}mme,pope")
    _refuse_unread(config)
    given = parse(config.lmms_args)
    if config.adapter is not None:
        check_adapter(config.adapter, config.model, config.revision)
    name = model_class(config.model, load.check_is_vlm(config.model).model_type, given)
    if config.dtype != "auto" and name not in TAKES_DTYPE:
        raise ConfigError(
            f"--dtype: lmms-eval's {name} chooses its own data type; leave the option out"
        )
    source, folder = load.pretrained_source(config.model), output_folder(config)
    check_path(source, "--model")
    check_path(str(folder.absolute()), "--output-dir")
    device = pick_device(config.device)
    dtype = str(load.pick_dtype(config.dtype, device)) if name in TAKES_DTYPE else None
    adapter = config.adapter / WEIGHTS if config.adapter else None
    identity = {
        "lmms_tasks": ",".join(tasks),
        "model": config.model,
        "lmms_model": name,
        "dtype": dtype,
        "adapter_digest": digest.file_digest(adapter)[:16] if adapter else None,
        "lmms_args": config.lmms_args,
        "limit": config.limit,
        "lmms_eval": installed,
    }
    wanted = {"base": config.base, "tuned": config.adapter is not None}
    roles = tuple(role for role, is_wanted in wanted.items() if is_wanted)
    dtype = dtype.removeprefix("torch.") if dtype else None
    return _Plan(tasks, roles, folder, given, name, source, str(device), dtype, identity)


def _refuse_unread(config: EvalConfig) -> None:
    """Raise ConfigError for an option that would be ignored."""
    default = EvalConfig(benchmark=config.benchmark)
    for name in _NOT_READ:
        if getattr(config, name) != getattr(default, name):
            raise ConfigError(
                f"{flag_name(name)} is not for --benchmark {LMMS}: lmms-eval asks in its own way; "
                "give it its own arguments with --lmms-args, as in '--batch_size 8'"
            )


def _answer(config: EvalConfig, plan: _Plan, role: str, source: str) -> None:
    """Run lmms-eval; its files appear in the folder of this role once they are complete."""
    arguments = plan.arguments(source, config.limit)
    log = plan.folder / f"{role}.log"
    ui.step(f"lmms-eval asks the {role} model {', '.join(plan.tasks)}; its output: {log}")
    ui.say(joined(arguments))
    part = plan.folder / f".{role}.partial"
    shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped
    lmms_process.answer(arguments, part, log)
    try:
        shutil.rmtree(plan.folder / role, ignore_errors=True)
        part.rename(plan.folder / role)
    except OSError as problem:
        raise DataError(f"cannot write '{plan.folder}': {problem.strerror or problem}") from problem


def _answer_tuned(config: EvalConfig, plan: _Plan) -> None:
    """Merge the adapter into a folder that is removed again, since not every class of lmms-eval
    loads adapters.
    """
    from vlmdpo.commands import export
    from vlmdpo.commands.rounds import free_memory

    with tempfile.TemporaryDirectory(prefix=".merged-", dir=plan.folder) as name:
        merged = Path(name) / "model"
        ui.step(f"merge the adapter into '{merged}', for the time of this run")
        export.run(
            ExportConfig(
                model=config.model,
                adapter=config.adapter,
                dtype=config.dtype,
                device=config.device,
                merge=True,
                output_dir=merged,
                quiet=config.quiet,
                json=config.json,
            )
        )
        free_memory()
        size = sum(path.stat().st_size for path in merged.rglob("*"))
        ui.say(f"the merged model takes {ui.human_bytes(size)} of disk until it has answered")
        _answer(config, plan, "tuned", str(merged))


def _report(
    config: EvalConfig, plan: _Plan, results: Mapping[str, Mapping[str, TaskResult]]
) -> dict[str, Any]:
    first = next(iter(results.values()))
    compared = lmms.compare(*results.values()) if len(results) == 2 else None
    asked = sum(task.asked for task in first.values() if task.documents)
    model, adapter = model_of(config)
    facts = {"engine": f"lmms-eval ({plan.model_class})", "identity": dict(plan.identity)}
    obtained = how_obtained(config, Answers({}, {}, facts), drawn=_OVER)
    return {
        "benchmark": config.benchmark,
        "title": f"lmms-eval: {', '.join(plan.tasks)}",
        "rule": "lmms-eval",
        "data_digest": _data_digest(first),
        "model": model,
        "adapter": adapter,
        "questions": asked,
        "descriptions": 0,
        "scores": _by_figure(results, lambda figure: figure.value),
        "intervals": _by_figure(results, lambda figure: figure.ci95),
        "stderr": _by_figure(results, lambda figure: figure.stderr),
        "models": {role: _facts(tasks) for role, tasks in results.items()},
        "coverage": 1.0,
        "unread": 0,
        "figures": _about_figures(first),
        "comparison": compared,
        "notes": _notes(results, compared),
        "published": [],
        "part": _part(first, asked),
        "main": [next(iter(first), ""), next(iter(_about_figures(first)), "")],
        **obtained,
        "versions": {**obtained["versions"], "lmms-eval": plan.identity["lmms_eval"]},
    }


def _by_figure(results: Mapping[str, Mapping[str, TaskResult]], read: Any) -> dict[str, Any]:
    """By role, task and figure, what `read` makes of it."""
    return {
        role: {
            name: {figure: read(value) for figure, value in task.figures.items()}
            for name, task in tasks.items()
        }
        for role, tasks in results.items()
    }


def _facts(tasks: Mapping[str, TaskResult]) -> dict[str, Any]:
    """What a model answered. Whether an answer could be read, lmms-eval does not say."""
    texts = [one.answer for task in tasks.values() for one in task.documents.values()]
    return {
        "coverage": 1.0,
        "answered": len(texts),
        "described": 0,
        "unread": 0,
        "unread_examples": [],
        "words": _mean([len(text.split()) for text in texts]),
        "repetition": _mean([repetition(text) for text in texts]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _data_digest(tasks: Mapping[str, TaskResult]) -> str:
    documents = [
        [name, number, one.question, one.truth]
        for name, task in tasks.items()
        for number, one in task.documents.items()
    ]
    return hashlib.sha256(json.dumps(documents).encode()).hexdigest()[:16]


def _part(tasks: Mapping[str, TaskResult], asked: int) -> dict[str, int] | None:
    """How much of the data `--limit` left, which are each task's first documents."""
    of = sum(task.of for task in tasks.values() if task.documents)
    if of <= asked:
        return None
    return {"questions": asked, "of_questions": of, "descriptions": 0, "of_descriptions": 0}


def _about_figures(tasks: Mapping[str, TaskResult]) -> dict[str, dict[str, Any]]:
    """By name, what pages say of a figure; None for the way on which tasks do not agree."""
    ways: dict[str, set[bool | None]] = {}
    for task in tasks.values():
        for name, figure in task.figures.items():
            ways.setdefault(name, set()).add(figure.more_is_better)
    return {
        name: {"unit": _UNIT, "more_is_better": found.pop() if len(found) == 1 else None}
        for name, found in ways.items()
    }


def _notes(
    results: Mapping[str, Mapping[str, TaskResult]], compared: Mapping[str, Any] | None
) -> list[str]:
    notes = ["figures are lmms-eval's, in its units; it does not say which answers it cannot read"]
    for name, task in next(iter(results.values())).items():
        changes = compared["figures"].get(name, {}) if compared else {}
        notes += [
            f"{name}, {figure}: {change['fixed']} fixed by tuning, {change['broken']} broken, "
            f"exact McNemar p = {change['mcnemar_p']:.2g}"
            for figure, change in changes.items()
            if "mcnemar_p" in change
        ]
        alone = [figure for figure in task.figures if figure not in changes]
        if len(results) == 2 and task.documents and alone:
            notes.append(
                f"{name}: tuned is not compared with base by {', '.join(alone)}, not a mean of "
                "documents' scores"
            )
        if task.unnumbered:
            notes.append(f"{name}: lmms-eval gives no number for {', '.join(task.unnumbered)}")
    return notes
