"""Options of `vlmdpo runs`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmdpo.config.common import ScreenOptions
from vlmdpo.config.options import option


@dataclass(frozen=True, kw_only=True)
class RunsConfig(ScreenOptions):
    """`vlmdpo runs`: the trainings under a folder, side by side."""

    folder: Path = option(
        Path("outputs"),
        "Folder that is searched for output folders of `vlmdpo train`; may stand without its name: "
        "vlmdpo runs outputs",
        group="Data",
    )
    page: bool = option(
        True, "Write runs.html into the folder: settings, curves and scores", group="Output"
    )
