"""Options of `vlmdpo demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmdpo.config.common import ScreenOptions
from vlmdpo.config.options import option, require_at_least


@dataclass(frozen=True, kw_only=True)
class DemoConfig(ScreenOptions):
    """`vlmdpo demo`: all five commands in one run on the embedded model, offline."""

    output_dir: Path = option(
        Path("outputs/demo"),
        "Folder for everything the demo writes; an earlier demo there is replaced",
        group="Output",
    )
    seed: int = option(42, "Seed of adapter weights and data order", group="Training")
    rounds: int = option(
        1,
        "Rounds: from the second on, on pairs of the tuned model's own answers, which it judges "
        "itself",
        group="Training",
    )

    def _check(self) -> None:
        require_at_least(self, 1, "rounds", unit="round")
