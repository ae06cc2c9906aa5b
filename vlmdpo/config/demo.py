"""Options of `vlmdpo demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmdpo.config.common import ScreenOptions
from vlmdpo.config.options import option


@dataclass(frozen=True, kw_only=True)
class DemoConfig(ScreenOptions):
    """`vlmdpo demo`: all five commands in one run on the embedded model, offline."""

    output_dir: Path = option(
        Path("outputs/demo"),
        "Folder for everything the demo writes; an earlier demo there is replaced",
        group="Output",
    )
    seed: int = option(42, "Seed of adapter weights and data order", group="Training")
