"""The card of a trained model: README.md with data, settings, curves, AMBER scores, versions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from vlmdpo.errors import DataError
from vlmdpo.models.registry import hub_id
from vlmdpo.report import figure_rows
from vlmdpo.report.amber_page import as_cell, span
from vlmdpo.report.html import environment

CARD, REPORT, RECIPE, AMBER = "README.md", "train_report.json", "recipe.yaml", "amber.json"
EVALUATIONS = "evaluations.json"  # beside it: the reports of other benchmarks, without answers
_KEPT = (
    *("title", "rule", "scores", "intervals", "figures", "comparison", "models"),
    *("coverage", "notes", "versions"),  # not `benchmark`: it may be a path on this machine
)
_FIGURES = ("Discriminative", "Existence", "Attribute", "State", "Number", "Action", "Relation")


def write(folder: Path, *, merged: bool = False) -> None:
    """Write the card of a folder of `vlmdpo train` or `vlmdpo export --merge`. Raises OSError.

    Args:
        folder: holds REPORT and RECIPE, and AMBER if the model was evaluated.
        merged: whether the folder holds merged weights rather than an adapter.
    """
    part = folder / f".{CARD}.partial"
    part.write_text(text(folder, merged=merged), encoding="utf-8")
    part.replace(folder / CARD)


def text(folder: Path, *, merged: bool) -> str:
    """The card as Markdown after the Hub's metadata; text from models and data is escaped."""
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    recipe = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    amber = (
        json.loads((folder / AMBER).read_text(encoding="utf-8"))
        if (folder / AMBER).is_file()
        else None
    )
    others = _evaluations(folder)
    base = _public(report["model"])
    data = _public(report["dataset"])
    standalone = merged or not recipe["lora"]
    metadata: dict[str, Any] = {
        "library_name": "transformers" if standalone else "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vlmdpo", "dpo", "trl", *([] if standalone else ["lora"])],
        # The Hub links a base model only by its own name.
        **({"base_model": base} if base.count("/") == 1 and not Path(base).exists() else {}),
    }
    jinja = environment({"span": span, "cell": as_cell, "public": _public}, escape=False)
    return jinja.get_template("model_card.md").render(
        metadata=yaml.safe_dump(metadata, sort_keys=False).strip(),
        report=report,
        base=base,
        embedded=report["model"] == "tiny",  # it is on no Hub
        data=data,
        settings=_settings(recipe, report),
        standalone=standalone,
        curves=report["curves"] and Path(report["curves"]).name,
        amber=amber,
        others=[{"report": one, "rows": figure_rows.rows(one)} for one in others],
        figures=[
            name
            for name in _FIGURES
            if amber and any(name in table for table in amber["scores"].values())
        ],
    )


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    """What `keep_evaluation` has put into a folder. Raises DataError for a damaged file."""
    path = folder / EVALUATIONS
    try:
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        found = list(kept.values())
        for one in found:
            figure_rows.rows(one)
    except (ValueError, LookupError, TypeError, AttributeError) as problem:
        raise DataError(f"'{path}' is damaged; remove it, then evaluate again") from problem
    return found


def _public(name: str) -> str:
    """The name of a dataset or model without its path on this machine."""
    return Path(name).name if Path(name).expanduser().exists() else hub_id(name)


def _settings(recipe: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are neither empty nor off nor specific to this machine."""
    settings = {**recipe, "learning_rate": report["learning_rate"]}
    named = ("model", "dataset", "adapter")
    settings |= {name: _public(recipe[name]) for name in named if recipe.get(name)}
    return {
        n: value
        for n, value in settings.items()
        if value not in (None, [], "", False) and n not in ("output_dir", "device")
    }


def keep_amber(folder: Path, report: Mapping[str, Any]) -> bool:
    """Put AMBER's scores into an adapter's folder, and rewrite its card.

    Returns False if the folder was not written by `vlmdpo train`. Raises OSError.
    """
    names = ("data", "is_amber", "scores", "comparison", "coverage", "versions")
    return _keep(folder, AMBER, _without_answers(report, names))


def keep_evaluation(folder: Path, report: Mapping[str, Any]) -> bool:
    """Put the figures of a benchmark into an adapter's folder, in the place of earlier ones of the
    same title, and rewrite its card.

    Returns False if the folder was not written by `vlmdpo train`. Raises OSError, DataError.
    """
    kept = {one["title"]: one for one in _evaluations(folder)}
    kept[report["title"]] = _without_answers(report, _KEPT)
    return _keep(folder, EVALUATIONS, kept)


def _without_answers(report: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """These parts of a report; the card has no answers."""
    kept = {name: report[name] for name in names}
    if kept["comparison"]:
        kept["comparison"] = {
            name: value for name, value in kept["comparison"].items() if name != "flips"
        }
    if "models" in kept:
        kept["models"] = {
            role: {name: value for name, value in facts.items() if name != "unread_examples"}
            for role, facts in kept["models"].items()
        }
    return kept


def _keep(folder: Path, name: str, content: Mapping[str, Any]) -> bool:
    if not (folder / REPORT).is_file() or not (folder / RECIPE).is_file():
        return False
    part = folder / f".{name}.partial"
    part.write_text(json.dumps(content, indent=2), encoding="utf-8")
    part.replace(folder / name)
    write(folder)
    return True
