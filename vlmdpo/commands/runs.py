"""`vlmdpo runs`: the trainings under a folder side by side: what differs, curves and scores."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.config import PER_CALL, RunsConfig, TrainConfig, recipes
from vlmdpo.errors import ConfigError, DataError
from vlmdpo.report import runs_page
from vlmdpo.report.metrics import METRICS_FILE, as_evaluation, read_lines

PAGE = "runs.html"
_RECIPE, _REPORT, _AMBER = "recipe.yaml", "train_report.json", "amber.json"
_ADVICE = "restore the file to list this run"  # not to remove it, which would lose its curves
_MAX_DEPTH = 4  # folders below the one that is searched
_MAX_RUNS = 500
_COLUMNS = 4  # settings that fit beside the figures on a screen
_OF_THE_PLACE = {*PER_CALL, "output_dir", "overwrite", "resume"}


def run(config: RunsConfig) -> dict[str, Any]:
    """Read every run, and write the page.

    Returns the runs, and the settings in which they differ. A run that cannot be read is left out
    with a warning.

    Raises DataError for a folder that is not there or holds no run.
    """
    if not config.folder.is_dir():
        raise DataError(f"--folder: '{config.folder}' is not a folder")
    found = [_read_or_warn(path, config.folder) for path in _run_folders(config.folder)]
    runs = [one for one in found if one is not None]
    if not runs:
        raise DataError(
            f"--folder: '{config.folder}' holds no run of vlmdpo train, {_MAX_DEPTH} folders deep"
        )
    report: dict[str, Any] = {
        "folder": str(config.folder),
        "runs": [{k: v for k, v in one.items() if k not in ("lines", "test")} for one in runs],
        "differing": _differing([one["settings"] for one in runs]),
        "page": str(config.folder / PAGE) if config.page else None,
    }
    if config.page:
        text = runs_page.page(str(config.folder), runs, report["differing"])
        part = config.folder / f".{PAGE}.partial"
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(config.folder / PAGE)
        except OSError as problem:
            raise DataError(
                f"cannot write '{config.folder / PAGE}': {problem.strerror}; leave it out with "
                "--no-page"
            ) from problem
    return report


def _run_folders(folder: Path) -> Iterator[Path]:
    """The folders of runs, by name; links are not followed."""
    count = 0
    for place, inner, files in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        hidden = [name for name in inner if name.startswith((".", "checkpoint-"))]
        inner[:] = [] if depth == _MAX_DEPTH else sorted(set(inner) - set(hidden))
        if _RECIPE in files and METRICS_FILE in files:
            if count == _MAX_RUNS:
                ui.warn(f"more than {_MAX_RUNS} runs: the others are left out")
                return
            count += 1
            yield Path(place)


def _read_or_warn(path: Path, above: Path) -> dict[str, Any] | None:
    try:
        return _read(path, above)
    except (ConfigError, DataError) as problem:
        ui.warn(f"left out '{path}': {problem}")
        return None


def _read(path: Path, above: Path) -> dict[str, Any]:
    """A run's settings, figures and curves. Raises ConfigError, DataError for damaged files."""
    recipe = recipes.read_recipe(path / _RECIPE)
    settings = {**recipes.plain(TrainConfig(), without=_OF_THE_PLACE), **recipe}
    lines = read_lines(path / METRICS_FILE, _ADVICE)
    trained = [line for line in lines if "loss" in line]
    evaluated = [as_evaluation(line) for line in lines if "eval_loss" in line]
    report, amber = _json(path / _REPORT), _json(path / _AMBER)
    last = trained[-1] if trained else {}
    return {
        "name": path.relative_to(above).as_posix() if path != above else path.absolute().name,
        "path": str(path),
        "is_finished": bool(report),
        "steps": report.get("steps", last.get("step", 0)),
        **{name: _number(last.get(name)) for name in runs_page.FIGURES},
        "eval": {
            name: _number(evaluated[-1].get(name) if evaluated else None)
            for name in runs_page.FIGURES
        },
        "best": report.get("best"),
        "amber": _amber(amber),
        "settings": {k: v for k, v in settings.items() if k not in _OF_THE_PLACE},
        "lines": trained,
        "test": evaluated,
    }


def _json(path: Path) -> dict[str, Any]:
    """A file's object; empty if there is none. Raises DataError for a damaged one."""
    if not path.is_file():
        return {}
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise DataError(f"'{path}' is damaged ({problem}); {_ADVICE}") from problem
    if not isinstance(held, dict):
        raise DataError(f"'{path}' is damaged (it does not hold an object); {_ADVICE}")
    return held


def _amber(kept: Mapping[str, Any]) -> dict[str, float | None] | None:
    """The tuned model's scores, and how much its accuracy differs from the base's."""
    scores = kept.get("scores")
    tuned = scores.get("tuned") or scores.get("base") if isinstance(scores, dict) else None
    if not isinstance(tuned, dict):
        return None
    overall, texts = tuned.get("Discriminative"), tuned.get("Generative")
    figures = {
        **(overall if isinstance(overall, dict) else {}),
        **(texts if isinstance(texts, dict) else {}),
    }
    comparison = kept.get("comparison")
    figures["delta_accuracy"] = (
        comparison.get("delta_accuracy") if isinstance(comparison, dict) else None
    )
    return {name: _number(figures.get(name)) for name in runs_page.SCORES}


def _number(value: object) -> float | None:
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(str(value)) if is_one else None


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of settings of which not all runs have the same value."""
    names = dict.fromkeys(name for one in settings for name in one)
    return [n for n in names if len({repr(one.get(n)) for one in settings}) > 1]


def show(report: dict[str, Any]) -> None:
    """Print the table: figures, and the first of the settings that differ."""
    shown = report["differing"][:_COLUMNS]
    scored = any(one["amber"] for one in report["runs"])
    ui.table(
        f"Runs in {report['folder']}",
        [
            *("Run", "Steps", "Loss", "Accuracy", "Margin", "Test loss"),
            *(["AMBER F1"] if scored else []),
            *shown,
        ],
        [
            [
                one["name"] + ("" if one["is_finished"] else " (not finished)"),
                f"{one['steps']:,}",
                *(runs_page.as_text(one[name], form) for name, form in runs_page.FIGURES.items()),
                runs_page.as_text(one["eval"]["loss"], "{:.4f}"),
                *([runs_page.as_text((one["amber"] or {}).get("f1"), "{:.1f}")] if scored else []),
                *(runs_page.as_setting(one["settings"].get(name)) for name in shown),
            ]
            for one in report["runs"]
        ],
        note="Loss, accuracy and margin: the last ones logged.",
        text=(0, *range(6 + scored, 6 + scored + len(shown))),
    )
    more = report["differing"][_COLUMNS:]
    if more:
        ui.result(f"They differ in {', '.join(more)} too.")
    if report["page"]:
        ui.result(f"Curves over one another, settings and scores: {report['page']}")
