"""The embedded training pairs: stored as scene specs and texts, drawn when they are read.

A row has RLAIF-V's columns: image, question, chosen, rejected.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from vlmdpo.data.images import encode
from vlmdpo.data.sources import Source, Streamed
from vlmdpo.tiny import scenes

FILE = "pairs.jsonl.gz"


def load() -> list[dict[str, Any]]:
    """Every stored row: {"scene": spec, "question", "chosen", "rejected", "origin"}.

    `origin` is "sampled" where the embedded model gave both answers, "truth" where the chosen one
    was written from the scene because no sample was right.
    """
    compressed = resources.files("vlmdpo.tiny").joinpath("assets", FILE).read_bytes()
    return [json.loads(line) for line in gzip.decompress(compressed).splitlines()]


def as_row(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored row with its image drawn, as PNG bytes."""
    image = scenes.draw(scenes.Scene.from_spec(stored["scene"]))
    return {
        "image": encode(image, "PNG"),
        **{name: stored[name] for name in ("question", "chosen", "rejected")},
    }


def source() -> Source:
    """The embedded pairs as a source for `prepare`."""
    rows = load()
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]

    def stream() -> Iterator[dict[str, Any]]:
        return map(as_row, rows)

    return Streamed(
        name="scenes", fingerprint=digest, count=len(rows), root=Path("."), stream=stream
    )
