"""Options of `vlmdpo prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vlmdpo.config.common import LengthOptions, OutputOptions, PromptOptions
from vlmdpo.config.options import option, require, require_at_least, require_choice
from vlmdpo.errors import ConfigError

MAX_WEIGHT = 100  # of --mix
MAP_TARGETS = ("image", "images", "question", "chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class SourceOptions(LengthOptions):
    """Which preference data, and how it is read."""

    group: ClassVar[str] = "Data"

    dataset: str = option(
        "scenes",
        "Preference data: an alias (scenes, rlaif-v), a Hub id, a local Parquet, JSONL, JSON, CSV "
        "or WebDataset tar file, a folder of such files, or a save_to_disk folder; several with "
        "commas between them are mixed",
        common=True,
    )
    mix: str | None = option(
        None,
        "How often the rows of each --dataset are taken, as in 1,0.5,2: all once, a random half, "
        "all twice",
        default_text="all once",
    )
    split: str = option(
        "train", 'Split of the source, slices included: "train", "train[:1%]", "train[100:200]"'
    )
    subset: str | None = option(None, "Configuration of a Hub dataset", default_text="its only one")
    dataset_revision: str | None = option(
        None, "Branch, tag or commit of a Hub dataset", default_text="the main branch"
    )
    streaming: bool = option(False, "Read a Hub dataset while it downloads, without keeping a copy")
    map: tuple[str, ...] = option(
        (),
        "If the format is not recognized: which column is image, images, question, chosen and "
        "rejected, as in question=prompt,chosen=answers.0; repeatable",
        default_text="recognized by the columns",
    )
    image_root: Path | None = option(
        None,
        "Folder that image paths start from, and may not leave",
        default_text="the folder of the data",
    )
    allow_root: Path | None = option(
        None,
        "One more folder that image paths and symbolic links may lead to",
        default_text="links lead nowhere but into --image-root",
    )
    limit: int | None = option(None, "Use at most this many rows", default_text="all rows")
    on_bad: str = option(
        "drop", "Rows that cannot be used: drop (counted by reason) or fail (stop at the first)"
    )
    test_size: float = option(
        0.0,
        "Rows of a test split, as a share below 1 or a number; no image is in both splits",
        default_text="none",
    )
    shuffle: bool = option(False, "Shuffle the rows by --seed")
    seed: int = option(42, "Seed of --shuffle and --test-size")

    def _check(self) -> None:
        require_at_least(self, 1, "limit", unit="row")
        is_share = 0 <= self.test_size < 1
        is_number = self.test_size >= 1 and self.test_size == int(self.test_size)
        wanted = "a share below 1, or a whole number of rows"
        require(is_share or is_number, self, "test_size", wanted)
        require_choice(self.on_bad, ("drop", "fail"), "on_bad")
        self.mapping()
        self.weights()
        if self.streaming and "[" in self.split:
            raise ConfigError(
                f"--split {self.split} selects rows by number, which --streaming cannot; use "
                "--limit instead"
            )

    def datasets(self) -> list[str]:
        """The sources of `--dataset`. Raises ConfigError for one that is named twice."""
        if "," not in self.dataset or Path(self.dataset).exists():
            return [self.dataset]
        names = [name.strip() for name in self.dataset.split(",")]
        if "" in names or len(set(names)) < len(names):
            raise ConfigError(
                f"--dataset: '{self.dataset}' names a source twice or none; to take rows several "
                "times, use --mix"
            )
        return names

    def weights(self) -> list[float]:
        """`--mix` as one number for each source. Raises ConfigError if it cannot be read."""
        names = self.datasets()
        if self.mix is None:
            return [1.0] * len(names)
        try:
            weights = [float(number) for number in str(self.mix).split(",")]
        except ValueError:
            weights = []
        if len(weights) != len(names) or not all(0 < weight <= MAX_WEIGHT for weight in weights):
            raise ConfigError(
                f"--mix: cannot read '{self.mix}'; give {len(names)} numbers above 0 and up to "
                f"{MAX_WEIGHT}, one for each --dataset, as in 1,0.5,2"
            )
        return weights

    def mapping(self) -> dict[str, str]:
        """`--map` as {target: column}. Raises ConfigError if it cannot be read."""
        columns: dict[str, str] = {}
        for pair in (one.strip() for given in self.map for one in given.split(",")):
            target, is_pair, column = pair.partition("=")
            if not is_pair or not column or target in columns:
                raise ConfigError(
                    f"--map: cannot read '{pair}'; give each target once, as in "
                    "question=prompt,chosen=good"
                )
            require_choice(target, MAP_TARGETS, "map")
            columns[target] = column
        return columns


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(SourceOptions, PromptOptions, OutputOptions):
    """`vlmdpo prepare`: preference pairs in, a checked dataset out."""

    num_proc: int | None = option(
        None,
        "Worker processes",
        default_text="one for every 4,000 rows, up to the CPU's cores; at most 4 for each",
        group="Memory and speed",
    )
    output_dir: Path | None = option(
        None,
        "Folder for the prepared dataset",
        default_text="outputs/data/<dataset>-<key>",
        group="Output",
    )
    overwrite: bool = option(
        False, "Prepare again even if a finished result of the same call exists", group="Output"
    )
    report: bool = option(
        True,
        "Write report.html, a page to inspect the data: sample pairs, lengths, sizes, dropped "
        "rows by reason",
        group="Output",
    )
    show: int = option(0, "Number of the example row to show, from 0", group="Output")
    push_to_hub: str | None = option(
        None,
        "Upload the prepared dataset with a card to this Hub repository (user/name)",
        default_text="nothing is uploaded",
        group="Output",
    )
    private: bool = option(
        True, "Make the repository of --push-to-hub private if it is new", group="Output"
    )

    def _check(self) -> None:
        require_at_least(self, 1, "num_proc")
        require_at_least(self, 0, "show")
