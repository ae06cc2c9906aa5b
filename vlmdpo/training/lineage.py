"""Which adapters a training goes on from, the first round first: what they are, and how they came.

An entry has `adapter` (its folder as it was named), `digest` (SHA-256 of its weights), and of one
that `vlmdpo train` made `dataset`, `steps`, `learning_rate` and `loss_type`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.config import recipes
from vlmdpo.errors import ConfigError, ModelError
from vlmdpo.models.adapter_files import WEIGHTS

LINEAGE = "lineage.json"  # in an output folder, from the start of its run
_REPORT, _RECIPE = "train_report.json", "recipe.yaml"


def lineage(adapter: Path | None) -> list[dict[str, Any]]:
    """The adapter to go on from, after those that it went on from itself; empty without one."""
    if adapter is None:
        return []
    from vlmdpo.models.digest import file_digest

    own: dict[str, Any] = {"adapter": str(adapter), "digest": file_digest(adapter / WEIGHTS)}
    if not (adapter / _REPORT).is_file():  # it comes from elsewhere
        return [own]
    try:
        report = json.loads((adapter / _REPORT).read_text(encoding="utf-8"))
        earlier = [dict(entry) for entry in report.get("lineage", [])]
        own |= {name: report[name] for name in ("dataset", "steps", "learning_rate")}
        own["loss_type"] = recipes.read_recipe(adapter / _RECIPE)["loss_type"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ConfigError) as problem:
        ui.warn(
            f"--adapter: the record of how '{adapter}' was trained is damaged ({problem}), so the "
            "chain of rounds begins with it"
        )
        return [own]
    return [*earlier, own]


def write(folder: Path, chain: list[dict[str, Any]]) -> None:
    """Keep the chain in the folder of a run that begins or goes on."""
    path = folder / LINEAGE
    if chain:
        path.write_text(json.dumps(chain, indent=2) + "\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


def check_same(folder: Path, adapter: Path | None) -> None:
    """Raise ModelError unless a resumed run goes on from the adapter that it was started with: from
    another, the reference would be another one halfway.
    """
    path = folder / LINEAGE
    try:
        began = json.loads(path.read_text(encoding="utf-8"))[-1] if path.is_file() else None
        digest = began["digest"] if began else None
    except (OSError, ValueError, LookupError, TypeError) as problem:
        raise ModelError(
            f"--resume: '{path}' is damaged: {problem}; start again with --overwrite"
        ) from problem
    now = lineage(adapter)
    if (now[-1]["digest"] if now else None) == digest:
        return
    if began is None:
        raise ModelError(
            f"--resume: the run in '{folder}' began without --adapter; leave it out, or choose "
            "another --output-dir"
        )
    if adapter is None:
        raise ModelError(f"--resume: the run goes on from --adapter '{began['adapter']}'; give it")
    raise ModelError(
        f"--resume: '{adapter}' is not what the run went on from ('{began['adapter']}', SHA-256 "
        f"{str(digest)[:12]}), or has changed since; give that one"
    )
