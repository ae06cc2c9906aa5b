"""Which data `vlmdpo prepare` reads: one source, or a mixture of several."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.config import PrepareConfig
from vlmdpo.config.options import flag_name
from vlmdpo.data import schemas
from vlmdpo.data.hub import open_source
from vlmdpo.data.mixture import Mixture, Part
from vlmdpo.data.schemas import Schema
from vlmdpo.data.sources import Source, bounds
from vlmdpo.errors import DataError


def open_mixture(config: PrepareConfig) -> Mixture:
    """The sources of `--dataset`, opened and their formats recognized.

    Raises DataError.
    """
    for option in ("image_root", "allow_root"):
        folder = getattr(config, option)
        if folder is not None and not folder.is_dir():
            raise DataError(f"{flag_name(option)}: the folder '{folder}' does not exist")
    names = config.datasets()
    _check_hub_options(names, config)
    parts = []
    for dataset, weight in zip(names, config.weights(), strict=True):
        source = _open_source(dataset, config)
        first, last = bounds(source, config.split, config.limit)
        parts.append(
            Part(
                source=source,
                schema=_schema(config, source),
                first=first,
                last=last,
                weight=weight,
                name=f"'{_short(source.name)}'" if len(names) > 1 else "",
            )
        )
    return Mixture(tuple(parts))


def _check_hub_options(names: list[str], config: PrepareConfig) -> None:
    """Raise DataError for an option of Hub datasets where none is read: it would do nothing."""
    if not all(name == "scenes" or Path(name).expanduser().exists() for name in names):
        return
    for option in ("subset", "dataset_revision", "streaming"):
        if getattr(config, option):
            raise DataError(
                f"{flag_name(option)} is for datasets on the Hub, and '{config.dataset}' is "
                "local; leave it out"
            )


def _short(name: str) -> str:
    return Path(name).name or name


def _open_source(dataset: str, config: PrepareConfig) -> Source:
    """One source. Raises DataError."""
    if dataset == "scenes":
        from vlmdpo.tiny import pairs

        split = config.split.partition("[")[0]
        if split != "train":
            raise DataError(f"--split: the embedded pairs have no split '{split}', only train")
        return pairs.source()
    source = open_source(
        dataset,
        config.split,
        image_root=config.image_root,
        subset=config.subset,
        revision=config.dataset_revision,
        streaming=config.streaming,
    )
    allowed = () if config.allow_root is None else (config.allow_root,)
    return dataclasses.replace(source, allowed=allowed)


def _schema(config: PrepareConfig, source: Source) -> Schema:
    """The source's format, by `--map` or recognized, printed before the work starts."""
    mapping, where = config.mapping(), f"'{source.name}'"

    def recognize(row: dict[str, Any]) -> Schema:
        if mapping:
            return schemas.mapped(mapping, source.columns, row, where)
        return schemas.detect(source.columns, row, where)

    def is_known(row: dict[str, Any]) -> bool:
        with contextlib.suppress(DataError):
            return bool(recognize(row))
        return False

    schema = recognize(source.first_row(is_known))
    count = ui.count(source.count, "row") if source.count is not None else "number of rows unknown"
    ui.say(
        f"{source.name}: {count}, format {schema.line}"
        + ("" if mapping else "; if that is wrong, name the columns with --map")
    )
    return schema


def key_facts(mixture: Mixture, config: PrepareConfig, side: int | None) -> dict[str, Any]:
    """Everything that changes the result: hashed into the key, and kept in the manifest."""
    own = ("on_bad", "max_length", "over_length", "test_size", "shuffle", "seed")
    facts = [_facts(part, config) for part in mixture.parts]
    if len(facts) == 1 and mixture.parts[0].weight == 1:
        source = facts[0]  # as before there were mixtures, so that older results are found again
    else:
        source = {
            "dataset": ", ".join(fact["dataset"] for fact in facts),
            "schema": ", ".join(dict.fromkeys(fact["schema"] for fact in facts)),
            "mixture": [
                {**fact, "mix": part.weight}
                for fact, part in zip(facts, mixture.parts, strict=True)
            ],
        }
    return {**source, "max_image_side": side, **{name: getattr(config, name) for name in own}}


def _facts(part: Part, config: PrepareConfig) -> dict[str, Any]:
    return {
        "dataset": part.source.name,
        "fingerprint": part.source.fingerprint,
        "rows": [part.first, part.last],
        "schema": part.schema.line,
        "image_root": str(part.source.root),
        **({"allow_root": str(config.allow_root)} if config.allow_root else {}),
    }
