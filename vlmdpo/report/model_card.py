"""The card of a trained model: README.md with data, settings, curves, AMBER scores, versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vlmdpo.models.registry import hub_id
from vlmdpo.report.amber_page import as_cell, span
from vlmdpo.report.html import environment

CARD, REPORT, RECIPE, AMBER = "README.md", "train_report.json", "recipe.yaml", "amber.json"
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
        figures=[
            name
            for name in _FIGURES
            if amber and any(name in table for table in amber["scores"].values())
        ],
    )


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
    if not (folder / REPORT).is_file() or not (folder / RECIPE).is_file():
        return False
    kept = {
        name: report[name]
        for name in ("data", "is_amber", "scores", "comparison", "coverage", "versions")
    }
    if kept["comparison"]:
        kept["comparison"] = {
            name: value for name, value in kept["comparison"].items() if name != "flips"
        }
    part = folder / f".{AMBER}.partial"
    part.write_text(json.dumps(kept, indent=2), encoding="utf-8")
    part.replace(folder / AMBER)
    write(folder)
    return True
