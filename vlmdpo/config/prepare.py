"""Options of `vlmdpo prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmdpo.config.options import Base, need, one_of, option
from vlmdpo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Base):
    """`vlmdpo prepare`: preference pairs in, a checked dataset out."""

    dataset: str = option(
        "scenes",
        "Preference data: an alias (scenes, rlaif-v), a Hub id, or a local Parquet, JSONL, JSON, "
        "CSV or WebDataset tar file, "
        "a folder of one kind of them, or a save_to_disk folder",
    )
    split: str = option(
        "train", 'Split of the source, slices included: "train", "train[:1%]", "train[100:200]"'
    )
    subset: str | None = option(None, "Configuration of a Hub dataset", default_text="its only one")
    dataset_revision: str | None = option(
        None, "Branch, tag or commit of a Hub dataset", default_text="the main branch"
    )
    streaming: bool = option(
        False, "Read a Hub dataset while it is downloaded, and keep no copy of it"
    )
    map: tuple[str, ...] = option(
        (),
        "Where the format is not recognised: which column is image, images, question, chosen, "
        "rejected, as in "
        "question=prompt,chosen=answers.0; may be repeated",
        default_text="recognised by the columns",
    )
    image_root: Path | None = option(
        None,
        "Folder that paths of pictures start from, and stay in",
        default_text="the folder of the data",
    )
    output_dir: Path | None = option(
        None, "Folder for the prepared dataset", default_text="outputs/data/<dataset>-<key>"
    )
    max_image_side: int | None = option(
        None,
        "Longest image side kept, in pixels; larger images are reduced",
        default_text="half the processor's limit",
    )
    max_length: int | None = option(
        None,
        "Longest sequence, prompt and images and answer together, in tokens",
        default_text="no limit",
    )
    over_length: str = option(
        "drop", "Rows beyond --max-length: drop them, or trim their answers (images are never cut)"
    )
    limit: int | None = option(
        None, "Take at most this many rows, counted in rows", default_text="all rows"
    )
    on_bad: str = option(
        "drop", "A row that cannot be used: drop (counted by reason) or fail (stop at one)"
    )
    test_size: float = option(
        0.0,
        "Rows set aside as a test split, as a share below 1 or a number; no image is in both",
        default_text="none",
    )
    shuffle: bool = option(False, "Put rows in another order, by --seed")
    seed: int = option(42, "Seed of --shuffle and of what --test-size sets aside")
    num_proc: int | None = option(
        None,
        "Processes that work at once, in number",
        default_text="one for every 4,000 rows, up to the CPU's cores",
    )
    show: int = option(0, "Row number of the example to show, counted from 0")
    report: bool = option(
        True,
        "Write report.html, a page to look the data over: sample pairs, lengths, sizes, dropped "
        "rows by reason",
    )
    push_to_hub: str | None = option(
        None,
        "Upload the prepared dataset, with a card, to this Hub repository (user/name)",
        default_text="nothing is uploaded",
    )
    private: bool = option(True, "Make the repository of --push-to-hub private where it is new")
    overwrite: bool = option(
        False, "Prepare again even where a finished result of the same call exists"
    )

    def __post_init__(self) -> None:
        need(
            self.max_image_side is None or self.max_image_side >= 1,
            "max_image_side",
            self.max_image_side,
            "1 pixel or more",
        )
        need(
            self.max_length is None or self.max_length >= 8,
            "max_length",
            self.max_length,
            "8 tokens or more",
        )
        need(self.limit is None or self.limit >= 1, "limit", self.limit, "1 row or more")
        need(self.num_proc is None or self.num_proc >= 1, "num_proc", self.num_proc, "1 or more")
        shared = 0 <= self.test_size < 1 or (
            self.test_size >= 1 and self.test_size == int(self.test_size)
        )
        need(shared, "test_size", self.test_size, "a share below 1, or a whole number of rows")
        one_of(self.on_bad, ("drop", "fail"), "on_bad")
        one_of(self.over_length, ("drop", "trim"), "over_length")
        need(self.show >= 0, "show", self.show, "0 or more")
        self.mapping()
        if self.streaming and "[" in self.split:
            raise ConfigError(
                f"--split {self.split} cuts by row number, which --streaming does not know; give "
                "--limit instead"
            )

    def mapping(self) -> dict[str, str]:
        """`--map` as {target: column}. Raises ConfigError where it cannot be read."""
        found: dict[str, str] = {}
        for pair in (one.strip() for given in self.map for one in given.split(",")):
            target, is_pair, column = pair.partition("=")
            if not is_pair or not column or target in found:
                raise ConfigError(
                    f"--map: cannot read '{pair}'; give each target once, as in "
                    "question=prompt,chosen=good"
                )
            one_of(target, ("image", "images", "question", "chosen", "rejected"), "map")
            found[target] = column
        return found
