"""`vlmdpo rounds`: make-pairs → prepare → train → eval-amber, again and again.

Each round goes on from the adapter of the one before.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from vlmdpo import ui
from vlmdpo.commands.rounds_folder import RoundsFolder
from vlmdpo.commands.rounds_stages import outcome_of, stage_config
from vlmdpo.config import STAGES, RoundsConfig
from vlmdpo.data.folder_lock import locked
from vlmdpo.distributed import launch
from vlmdpo.errors import Interrupted, Preempted
from vlmdpo.models.adapter_files import check_adapter
from vlmdpo.report import rounds_page
from vlmdpo.report.rounds_page import FIGURES, best_round, why_not_helpful


def run(config: RoundsConfig) -> dict[str, Any]:
    """Run what is left of the rounds; returns the report.

    Raises:
        ConfigError: a stage's setting that its command does not know.
        DataError: a folder that holds something else, or rounds with other settings.
        Whatever a stage raises; what is done is kept.
    """
    if config.adapter is not None:
        check_adapter(config.adapter, config.model, config.revision)
    for stage in STAGES:
        stage_config(config, stage, 1)  # said before anything is computed
    folder = RoundsFolder(config)
    with locked(config.output_dir, "running rounds in"):
        folder.open()
        _run_stage(config, folder, 0, "eval_amber")
        best_round(folder.figures(), config.best_by, config.max_cover_loss)  # can it be chosen?
        stopped = None
        for number in range(1, config.rounds + 1):
            for stage in STAGES:
                _run_stage(config, folder, number, stage)
            stopped = _judge(config, folder, number)
            _write_pages(config, folder)
            if stopped is not None and config.stop:
                break
        return _report(config, folder, stopped if config.stop else None)


def _run_stage(config: RoundsConfig, folder: RoundsFolder, number: int, stage: str) -> None:
    """Run a stage unless it is done, and keep what comes of it."""
    if folder.is_done(number, stage):
        return
    name = stage.replace("_", "-")
    what = f"round {number} of {config.rounds}: {name}" if number else f"before round 1: {name}"
    ui.step(what)
    settings: Any = stage_config(config, stage, number)
    started = time.monotonic()
    with _place_in_errors(what):
        if hasattr(settings, "num_processes") and launch.is_launcher(settings):
            report = launch.run(name, settings)
        else:
            report = importlib.import_module(f"vlmdpo.commands.{stage}").run(settings)
    free_memory()
    outcome = {**outcome_of(stage, report), "elapsed_s": round(time.monotonic() - started, 1)}
    folder.keep(number, stage, outcome)


def free_memory() -> None:
    """Let go of a stage's model: the next one loads it again, perhaps in processes of its own."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _place_in_errors(what: str) -> Iterator[None]:
    """Inside, a stage that was stopped says where the rounds are, and how they go on."""
    try:
        yield
    except (Interrupted, Preempted) as problem:
        raise type(problem)(
            f"stopped in {what}; finished stages are kept, repeat the command to continue"
        ) from problem


def _judge(config: RoundsConfig, folder: RoundsFolder, number: int) -> str | None:
    """Say what a round brought; returns why it did not help, or None if it did."""
    scored = folder.figures()
    reason = why_not_helpful(scored, number, config.max_cover_loss)
    before, now = scored[number - 1], scored[number]
    changes = [
        f"{heading} {before[name]:.1f} → {now[name]:.1f}"
        for name, (heading, _) in FIGURES.items()
        if before.get(name) is not None and now.get(name) is not None
    ]
    ui.say(f"round {number}: {', '.join(changes)}")
    if reason is not None:
        ui.say(f"round {number} does not help: {reason}")
    return reason


def _write_pages(config: RoundsConfig, folder: RoundsFolder) -> None:
    scored = folder.figures()
    best = best_round(scored, config.best_by, config.max_cover_loss)
    with folder.writing():
        rounds_page.draw(scored, best, folder.path / rounds_page.PICTURE)
        text = rounds_page.page(
            title=f"{config.model}: {ui.count(len(scored) - 1, 'round')}",
            scored=scored,
            best=best,
            stages=folder.rounds,
            reasons=_reasons(config, scored),
            picture=folder.path / rounds_page.PICTURE,
            settings=folder.settings,
        )
        folder.write_text(rounds_page.PAGE, text)


def _reasons(config: RoundsConfig, scored: list[dict[str, Any]]) -> dict[int, str | None]:
    """Of each round, why it did not help; None if it did."""
    return {
        number: why_not_helpful(scored, number, config.max_cover_loss)
        for number in range(1, len(scored))
    }


def _report(config: RoundsConfig, folder: RoundsFolder, stopped: str | None) -> dict[str, Any]:
    scored = folder.figures()
    best = best_round(scored, config.best_by, config.max_cover_loss)
    adapter = folder.adapter(best) if best else config.adapter
    report = {
        "output_dir": str(folder.path),
        "model": config.model,
        "rounds": [
            {"round": number, **figures, "stages": folder.rounds[number]}
            for number, figures in enumerate(scored)
        ],
        "best": best,
        "best_adapter": None if adapter is None else str(adapter),
        "stopped": stopped,
        "page": str(folder.path / rounds_page.PAGE),
        "picture": str(folder.path / rounds_page.PICTURE),
    }
    folder.finish({"best": best, "stopped": stopped})
    return report


def show(report: dict[str, Any]) -> None:
    """Print the figures over the rounds, and where the best adapter is."""
    names = [n for n in FIGURES if any(one.get(n) is not None for one in report["rounds"])]
    ui.table(
        f"Rounds of {report['model']}",
        ["Round", *(FIGURES[name][0] for name in names)],
        [
            [
                f"{one['round']}" + (" (best)" if one["round"] == report["best"] else ""),
                *("-" if one.get(name) is None else f"{one[name]:.1f}" for name in names),
            ]
            for one in report["rounds"]
        ],
        note="Round 0 is the model before the first round. Words: of a description, on average.",
    )
    if report["stopped"]:
        ui.result(f"Stopped after round {len(report['rounds']) - 1}: {report['stopped']}.")
    if report["best"]:
        ui.result(f"Best round: {report['best']}; its adapter: {report['best_adapter']}")
    else:
        ui.result("No round is better than the model before the first one.")
    ui.result(f"Figures over rounds, settings and what each stage did: {report['page']}")
