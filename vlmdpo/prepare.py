"""`vlmdpo prepare`: preference pairs from any source, every row checked, images bounded, stored once."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmdpo import __version__, ui
from vlmdpo.config import PrepareConfig
from vlmdpo.data import images, store
from vlmdpo.data.sources import BadRow, PreferencePair, Source, bounds, check, open_source
from vlmdpo.errors import DataError
from vlmdpo.models.registry import short_name

_EXAMPLES_KEPT = 3  # bad rows remembered by reason, for the manifest


def run(config: PrepareConfig) -> dict[str, Any]:
    """Prepare the data, or find it prepared. Returns the manifest with `path` and `reused`.

    Raises:
        DataError: unreadable source, missing column, no usable row, an output folder that holds something else.
        ModelError: the model whose processor bounds the images cannot be found.
    """
    if config.output_dir is not None and config.output_dir.is_file():
        raise DataError(f"--output-dir: '{config.output_dir}' is a file")
    source = _open(config)
    first, last = bounds(source, config.split, config.limit)
    from vlmdpo.models.families import default_image_side
    from vlmdpo.models.load import load_processor

    processor = load_processor(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    side = config.max_image_side or default_image_side(processor)
    facts = {"dataset": source.name, "fingerprint": source.fingerprint, "rows": [first, last], "max_image_side": side}
    key = store.key_of({**facts, "on_bad": config.on_bad})
    folder = config.output_dir or Path("outputs") / "data" / f"{short_name(source.name)}-{key[:8]}"
    manifest = store.read_manifest(folder)
    reused = manifest is not None and manifest["key"] == key and not config.overwrite
    if not reused:
        store.usable_output(folder, config.overwrite)
        manifest = _prepare(source, first, last, side, key, folder, config)
    assert manifest is not None
    return {**manifest, "path": str(folder), "reused": reused, "example": _example(processor, folder, config.show)}


def _open(config: PrepareConfig) -> Source:
    if config.dataset == "scenes":
        from vlmdpo.tiny import pairs

        return pairs.source()
    return open_source(config.dataset, config.split)


def _prepare(
    source: Source, first: int, last: int, side: int | None, key: str, folder: Path, config: PrepareConfig
) -> dict[str, Any]:
    dropped: dict[str, int] = {}
    examples: dict[str, list[str]] = {}

    def good_pairs() -> Iterator[PreferencePair]:
        with ui.progress("prepare", last - first) as bar:
            for number, row in enumerate(source.rows(first, last), start=first):
                try:
                    pair = check(row, source.image_root)
                    yield dataclasses.replace(pair, image=images.bound(pair.image, side))
                except (BadRow, images.BadImage) as problem:
                    if config.on_bad == "fail":
                        raise DataError(f"'{source.name}' row {number}: {problem.reason}: {problem}") from problem
                    dropped[problem.reason] = dropped.get(problem.reason, 0) + 1
                    kept = examples.setdefault(problem.reason, [])
                    if len(kept) < _EXAMPLES_KEPT:
                        kept.append(f"row {number}: {problem}")
                bar.advance()

    def describe() -> dict[str, Any]:
        return {
            "key": key,
            "dataset": source.name,
            "split": config.split,
            "fingerprint": source.fingerprint,
            "rows_in": last - first,
            "dropped": dropped,
            "dropped_examples": examples,
            "max_image_side": side,
            "model": config.model,
            "versions": _versions(),
        }

    return store.write(folder, good_pairs(), describe)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("datasets", "pillow", "pyarrow", "transformers")
    return {"vlmdpo": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}


def _example(processor: Any, folder: Path, number: int) -> dict[str, Any]:
    """One row as the model will read it: rendered through its chat template."""
    from trl.data_utils import apply_chat_template, prepare_multimodal_messages

    dataset = store.load(folder)
    if number >= len(dataset):
        raise DataError(f"--show: row {number} is not among the {len(dataset)} prepared rows, counted from 0")
    row = dataset[number]
    messages = {
        "prompt": prepare_multimodal_messages(row["prompt"], images=row["images"]),
        "chosen": prepare_multimodal_messages(row["chosen"]),
        "rejected": prepare_multimodal_messages(row["rejected"]),
    }
    rendered = apply_chat_template(messages, processor)
    sizes = [f"{picture.width}x{picture.height}" for picture in row["images"]]
    return {"row": number, "images": sizes, **{name: rendered[name] for name in ("prompt", "chosen", "rejected")}}


def show(report: dict[str, Any]) -> None:
    """Print what came out, what was dropped and why, and one example."""
    done = "Found prepared" if report["reused"] else "Prepared"
    ui.result(f"{done}: {report['rows_out']:,} of {report['rows_in']:,} pairs of {report['dataset']} in {report['path']}")
    side = f"at most {report['max_image_side']} px a side" if report["max_image_side"] else "not bounded"
    ui.result(f"  images {side}, {ui.human_bytes(report['bytes'])} on disk")
    if report["dropped"]:
        rows = [[reason, f"{count:,}", report["dropped_examples"][reason][0]] for reason, count in report["dropped"].items()]
        ui.table("Dropped", ["Reason", "Rows", "First of them"], rows)
    if sum(report["dropped"].values()) > 0.05 * report["rows_in"]:
        share = 100 * sum(report["dropped"].values()) / report["rows_in"]
        ui.warn(f"{share:.0f}% of the rows were dropped; look at the reasons before you train")
    example = report["example"]
    ui.result(f"Row {example['row']} as {report['model']} will read it (image {', '.join(example['images']) or 'none'}):")
    for name in ("prompt", "chosen", "rejected"):
        ui.result(f"  {name:<9}{example[name]!r}")
