"""`vlmdpo demo --rounds`: rounds of the demo's model on its own answers, which it judges itself."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from vlmdpo import config as cf
from vlmdpo.commands import rounds

_YES_NO = "yes-no.jsonl"


def run(folder: Path, adapter: Path, config: cf.DemoConfig) -> dict[str, Any]:
    """Rounds after the first; returns the report of `vlmdpo rounds`.

    Descriptions are paired, and as many yes/no pairs of the embedded set are mixed with them: on
    descriptions alone a model forgets how to answer questions.

    Args:
        folder: of the demo.
        adapter: of its first round.
    """
    yes_no = folder / _YES_NO
    _write_yes_no_pairs(yes_no)
    return rounds.run(
        cf.RoundsConfig(
            adapter=adapter,
            rounds=config.rounds - 1,
            mix_with=str(yes_no),
            stop=False,  # what a round brings is shown, whatever it is
            make_pairs=(f"seed={config.seed}",),
            train=(f"seed={config.seed}",),
            output_dir=folder / "rounds",
        )
    )


def _write_yes_no_pairs(path: Path) -> None:
    """The embedded pairs whose answers are Yes and No, as `prepare` takes them."""
    from vlmdpo.tiny import pairs

    with path.open("w", encoding="utf-8") as file:
        for stored in pairs.load():
            if {stored["chosen"], stored["rejected"]} == {"Yes", "No"}:
                row = pairs.as_row(stored)
                row["image"] = base64.b64encode(row["image"]).decode()
                file.write(json.dumps(row) + "\n")
