"""The embedded evaluation set: scenes held out from all else, in AMBER's own JSON layout.

`make` builds it (seeded) and `write` stores it; `FOLDER` is where the shipped copy lies. Its images
are not stored: `draw_image` draws them from their specs. The numbers of questions keep AMBER's
proportions over its types and over yes and no; existence is asked only of what is absent, and a
negative relation has the plain type `relation`, both as in AMBER.
"""

from __future__ import annotations

import json
import random
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from vlmdpo.tiny import scenes as sc

SCENES = 100
# AMBER asks 14,216 questions about 1,004 images; these are its counts for 100 images.
QUOTAS = {
    (sc.STATE, "yes"): 237,
    (sc.STATE, "no"): 237,
    (sc.NUMBER, "yes"): 103,
    (sc.NUMBER, "no"): 103,
    (sc.ACTION, "yes"): 39,
    (sc.ACTION, "no"): 39,
    (sc.EXISTENCE, "no"): 490,
    (sc.RELATION, "yes"): 97,
    (sc.RELATION_NO, "no"): 69,
}
# Other names of a thing in a description, as in AMBER's relation.json.
SYNONYMS = {"circle": ("disc",), "moon": ("crescent",), "ring": ("hoop",), "cross": ("plus",)}
FOLDER = Path(str(resources.files("vlmdpo.tiny").joinpath("assets", "amber")))
_SPECS = "scenes.json"


def make(seed: int = 2024) -> dict[str, Any]:
    """The set as {file name: JSON data, or text}."""
    rng = random.Random(seed)
    drawn: dict[str, sc.Scene] = {}
    while len(drawn) < SCENES:
        scene = sc.sample_scene(rng, "evaluation")
        # AMBER asks about five absences and one contact per image. Two or three kinds leave that
        # many of eight absent, and unfiltered scenes have half as many contacts.
        if len(scene.kinds()) in (2, 3) and (scene.touching or len(drawn) >= 0.9 * SCENES):
            drawn.setdefault(scene.key(), scene)
    names = {f"SCENE_{number}.png": scene for number, scene in enumerate(drawn.values(), start=1)}
    queries, annotations = [], []
    for number, (name, scene) in enumerate(names.items(), start=1):
        absent = [
            sc.COMPANION[kind] for kind in scene.kinds() if sc.COMPANION[kind] not in scene.kinds()
        ]
        queries.append({"id": number, "image": name, "query": sc.DESCRIBE})
        annotations.append(
            {"id": number, "type": "generative", "truth": list(scene.kinds()), "hallu": absent}
        )
    generative = list(queries)
    for number, (name, question) in enumerate(_pick_questions(names, rng), start=SCENES + 1):
        queries.append({"id": number, "image": name, "query": question.text})
        annotations.append({"id": number, "type": question.type, "truth": question.truth})
    return {
        "annotations.json": annotations,
        "query/query_all.json": queries,
        "query/query_generative.json": generative,
        "query/query_discriminative.json": queries[SCENES:],
        "relation.json": {kind: list(SYNONYMS.get(kind, ())) for kind in sc.KINDS},
        "safe_words.txt": "",
        _SPECS: {name: scene.spec() for name, scene in names.items()},
    }


def _pick_questions(
    names: dict[str, sc.Scene], rng: random.Random
) -> list[tuple[str, sc.Question]]:
    """Questions up to each quota, taken from the images in turn so that each gets its share."""
    pools = {name: sc.questions(scene, rng) for name, scene in names.items()}
    picked: list[tuple[str, sc.Question]] = []
    for group, quota in QUOTAS.items():
        missing = quota
        while missing:
            taken = [(name, pool[group].pop()) for name, pool in pools.items() if pool.get(group)][
                :missing
            ]
            assert taken, f"the scenes hold too few questions of {group}"
            picked += taken
            missing -= len(taken)
    return picked


def write(folder: Path = FOLDER) -> None:
    """Store the set as files under `folder`."""
    for name, data in make().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = (
            data
            if isinstance(data, str)
            else json.dumps(data, indent=None, separators=(",", ":")) + "\n"
        )
        path.write_text(text, encoding="utf-8")


@cache
def _specs() -> dict[str, Any]:
    specs: dict[str, Any] = json.loads((FOLDER / _SPECS).read_text(encoding="utf-8"))
    return specs


def draw_image(name: str) -> Image.Image:
    """An image of the embedded set, by its name. Raises KeyError where there is none."""
    return sc.draw(sc.Scene.from_spec(_specs()[name]))


def first_image_name() -> str:
    """The name of the image that `infer` shows when none is given."""
    return next(iter(_specs()))
