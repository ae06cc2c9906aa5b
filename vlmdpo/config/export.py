"""Options of `vlmdpo export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmdpo.config.common import OutputOptions, RuntimeOptions
from vlmdpo.config.options import option
from vlmdpo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExportConfig(RuntimeOptions, OutputOptions):
    """`vlmdpo export`: an adapter as a standalone model, on disk or on the Hub."""

    adapter: Path | None = option(
        None,
        "Folder of a trained adapter; --model defaults to the base it names",
        group="Model",
    )
    merge: bool = option(
        False,
        "Merge the adapter into its base: a standalone model, checked to give the same answers",
        group="Output",
    )
    output_dir: Path | None = option(
        None, "Folder for the merged model", default_text="<adapter>-merged", group="Output"
    )
    overwrite: bool = option(
        False, "Replace an earlier export in the output folder", group="Output"
    )
    push_to_hub: str | None = option(
        None,
        "Upload the merged model (without --merge, the adapter) with its card to this Hub "
        "repository (user/name)",
        default_text="nothing is uploaded",
        group="Output",
    )
    private: bool = option(
        True, "Make the repository of --push-to-hub private if it is new", group="Output"
    )

    def _check(self) -> None:
        if self.adapter is None:
            raise ConfigError("--adapter FOLDER is needed: the output folder of vlmdpo train")
        if not self.merge and not self.push_to_hub:
            raise ConfigError("nothing to do: give --merge, --push-to-hub user/name, or both")
        if self.output_dir is not None and not self.merge:
            raise ConfigError("--output-dir is for --merge")
