"""Options of `vlmdpo compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmdpo.config.common import OutputOptions, RuntimeOptions
from vlmdpo.config.options import option, require, require_at_least, require_positive
from vlmdpo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CompareConfig(RuntimeOptions, OutputOptions):
    """`vlmdpo compare`: a page on this machine with the answers of base and tuned side by side."""

    eval: Path | None = option(
        None,
        "Folder that eval wrote for one benchmark; its changed answers are the first examples",
        default_text="the latest that eval or eval-amber wrote for this adapter where they do by "
        "default, if they have",
        group="Data",
    )
    amber: Path | None = option(
        None,
        "Folder written by eval-amber, likewise",
        default_text="see --eval",
        group="Data",
    )
    examples: Path | None = option(
        None,
        "JSONL of more examples: image, question on each line",
        default_text="none",
        group="Data",
    )
    image_root: Path | None = option(
        None,
        "Folder that paths in --examples start from",
        default_text="the folder of --examples",
        group="Data",
    )
    max_upload_mb: int = option(20, "Largest image that can be uploaded, in MB", group="Data")
    adapter: Path | None = option(
        None,
        "Folder of a trained adapter; --model defaults to the base it names",
        default_text="for the embedded model, the one shipped with it",
        group="Model",
    )
    max_new_tokens: int = option(128, "Longest answer, in tokens", group="Generation")
    beta: float | None = option(
        None,
        "Beta of the rewards shown",
        default_text="the one the adapter was trained with, else 0.1",
        group="Output",
    )
    votes: Path = option(
        Path("outputs/votes/preferences.jsonl"),
        "JSONL that votes are appended to; vlmdpo prepare accepts it",
        group="Output",
    )
    blind: bool = option(
        True,
        "Left and right at random, and the models' names only after the vote",
        group="Output",
    )
    host: str = option(
        "127.0.0.1",
        "Address to serve on; any but this machine's own lets others in",
        group="Output",
    )
    port: int | None = option(
        None, "Port to serve on", default_text="7860, or the next free one", group="Output"
    )
    allow_host: tuple[str, ...] = option(
        (),
        "Another name under which browsers reach the page, such as a proxy's; repeatable",
        default_text="this machine's own",
        group="Output",
    )
    share: bool = option(
        False,
        "Make the page public through gradio's relay for 72 hours: anyone with the link can ask",
        group="Output",
    )
    open: bool = option(False, "Open the page in a browser", group="Output")

    def _check(self) -> None:
        require_positive(self, "beta")
        require_at_least(self, 1, "max_new_tokens", unit="token")
        require_at_least(self, 1, "max_upload_mb", unit="MB")
        require(self.port is None or 1 <= self.port <= 65535, self, "port", "1 to 65535")
        if self.adapter is None and self.model != "tiny":
            raise ConfigError("--adapter FOLDER is needed to compare the base model with")
