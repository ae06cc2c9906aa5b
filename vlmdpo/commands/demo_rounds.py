"""`vlmdpo demo --rounds`: rounds of the demo's model on its own answers, which it judges itself."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

from vlmdpo import config as cf
from vlmdpo import ui
from vlmdpo.commands import rounds

_YES_NO = "yes-no.jsonl"
_YES_NO_PAIRS = 200
_RATE = 1e-4  # a third of the first round's, at which Cover fell by 4.4 points instead of 2.6


def run(folder: Path, adapter: Path, config: cf.DemoConfig) -> dict[str, Any]:
    """Rounds after the first; returns the report of `vlmdpo rounds`.

    Its pairs are of descriptions. Some yes/no pairs of the embedded set are mixed with them: on
    descriptions alone a model forgets how to answer questions.

    Args:
        folder: of the demo.
        adapter: of its first round.
    """
    yes_no = folder / _YES_NO
    _write_yes_no_pairs(yes_no, config.seed)
    return rounds.run(
        cf.RoundsConfig(
            adapter=adapter,
            rounds=config.rounds - 1,
            mix_with=str(yes_no),
            stop=False,  # what a round brings is shown, whatever it is
            make_pairs=(f"seed={config.seed}",),
            train=(f"seed={config.seed}", f"learning_rate={_RATE}"),
            output_dir=folder / "rounds",
        )
    )


def show(report: dict[str, Any]) -> None:
    """Print what the rounds brought, whatever it is."""
    ui.result("Rounds on its own answers, judged by itself; round 0 here is the tuned model above.")
    rounds.show(report)


def _write_yes_no_pairs(path: Path, seed: int) -> None:
    """Some of the embedded pairs whose answers are Yes and No, as `prepare` takes them."""
    from vlmdpo.tiny import pairs

    known = [one for one in pairs.load() if {one["chosen"], one["rejected"]} == {"Yes", "No"}]
    with path.open("w", encoding="utf-8") as file:
        for stored in random.Random(seed).sample(known, _YES_NO_PAIRS):
            row = pairs.as_row(stored)
            row["image"] = base64.b64encode(row["image"]).decode()
            file.write(json.dumps(row) + "\n")
