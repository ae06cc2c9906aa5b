"""What `make-pairs` asks of the embedded model where nothing else is given: scenes to describe.

The embedded model understands only the questions that it was taught, so its descriptions are split
into those (`claims_of`). The truth about each scene is known (`SceneTruth`).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import partial

from vlmdpo.data.images import encode
from vlmdpo.feedback.judges.base import NO, YES, Claim, Judgment, Statement
from vlmdpo.feedback.judges.truth import NOT_ANNOTATED
from vlmdpo.feedback.pictures import Picture
from vlmdpo.tiny import scenes as sc

SCENES = 100
SEED = 11  # other scenes than those of the embedded pairs, but of the same split


def pictures(count: int) -> tuple[list[Picture], dict[str, sc.Scene]]:
    """(scenes of the train split to describe, the scenes by the names of the pictures)."""
    rng = random.Random(SEED)
    scenes: dict[str, sc.Scene] = {}
    while len(scenes) < count:
        scene = sc.sample_scene(rng, "train")
        scenes.setdefault(f"scene-{scene.key()}", scene)
    drawn = [Picture(name, (sc.DESCRIBE,), partial(_png, one)) for name, one in scenes.items()]
    return drawn, scenes


def _png(scene: sc.Scene) -> bytes:
    return encode(sc.draw(scene), "PNG")


def claims_of(prompt: str, answer: str) -> list[Claim] | None:
    """What a description says of each kind, as questions that the embedded model was taught.

    None for a text that is not worded as scenes are described.
    """
    claims = sc.read_claims(answer)
    if not claims or sc.describe(claims) != answer:
        return None
    return [
        Claim(f"{claim.number} {claim.colour} {claim.kind}", question, kind)
        for claim in claims
        for kind, question in _questions(claim)
    ]


def _questions(claim: sc.Claim) -> Iterable[tuple[str, str]]:
    """(kind, question) of each property that a description gives a kind of thing."""
    yield "existence", f"Is there a {claim.kind} in this image?"
    yield "number", sc.how_many(claim.number, claim.kind)
    yield "state", f"Is the {claim.kind} {claim.colour} in this image?"
    if claim.action:
        yield "action", f"Does the {claim.kind} {claim.action} in this image?"


class SceneTruth:
    """The truth about scenes, by the names of their pictures."""

    def __init__(self, scenes: dict[str, sc.Scene]) -> None:
        self._scenes = scenes

    def of(self, image: str, prompt: str, answer: str) -> Judgment:
        """See `feedback.judges.truth.Truth`."""
        scene = self._scenes.get(image)
        claims = sc.read_claims(answer)
        if scene is None or prompt != sc.DESCRIBE:
            return Judgment(unread=NOT_ANNOTATED)
        if not claims or sc.describe(claims) != answer:
            return Judgment(unread="the description is not worded as scenes are described")
        truth = {claim.kind: claim for claim in sc.truth_claims(scene)}
        return Judgment(
            tuple(one for claim in claims for one in _statements(claim, truth.get(claim.kind)))
        )


def _statements(claim: sc.Claim, true: sc.Claim | None) -> Iterable[Statement]:
    """Whether each property is right; none is of a kind that is not there."""
    properties = ("kind", "number", "colour", *(("action",) if claim.action else ()))
    for name in properties:
        said = getattr(claim, name)
        right = true is not None and said == getattr(true, name)
        yield Statement(f"{claim.kind}: {said}", verdict=YES if right else NO, kind=name)
