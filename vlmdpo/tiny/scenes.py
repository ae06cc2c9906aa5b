"""Scenes: small drawings whose truth is known, and what can be asked about them.

A scene is a spec (shapes on a 3 by 3 grid); the image, the questions and the right answers all
follow from it. This module knows nothing of models, files or training: it draws, asks and scores.

Scenes fall into two splits by a hash of their content, "train" and "evaluation", so that no list of
seen images has to be kept; see `Scene.split`.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image, ImageDraw

from vlmdpo.tiny import shapes

SIDE_PX = 72
KINDS = ("circle", "square", "triangle", "star", "moon", "heart", "ring", "cross")
# What usually stands together, so that a model which has seen many scenes expects it where it is
# missing.
COMPANION = {
    "star": "moon",
    "moon": "star",
    "circle": "ring",
    "ring": "circle",
    "square": "cross",
    "cross": "square",
    "triangle": "heart",
    "heart": "triangle",
}
COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
ACTIONS = ("jump", "spin", "shine", "sleep")
NUMBERS = ("one", "two", "three")
EXISTENCE, STATE, NUMBER = (
    "discriminative-hallucination",
    "discriminative-attribute-state",
    "discriminative-attribute-number",
)
ACTION, RELATION, RELATION_NO = (
    "discriminative-attribute-action",
    "discriminative-relation",
    "relation",
)
DESCRIBE = "Describe this image."


@dataclass(frozen=True)
class Thing:
    """One drawn shape.

    Attributes:
        action: one of ACTIONS, or "" for none.
        cell: 0 to 8, row by row.
        dx, dy: offset from the cell's middle, in pixels.
    """

    kind: str
    colour: str
    action: str
    cell: int
    dx: int = 0
    dy: int = 0


@dataclass(frozen=True)
class Question:
    """One yes/no question of a scene, typed as AMBER types it. `truth` is "yes" or "no"."""

    text: str
    type: str
    truth: str


@dataclass(frozen=True)
class Scene:
    """All that an image shows.

    Things of one kind share colour and action, so that "the star" is never ambiguous.

    Attributes:
        touching: pairs of cells, left and right, whose things are in contact.
    """

    background: str
    things: tuple[Thing, ...]
    touching: tuple[tuple[int, int], ...] = ()

    def spec(self) -> dict[str, Any]:
        """The scene as plain JSON data; `Scene.from_spec` reads it back."""
        return asdict(self)

    @staticmethod
    def from_spec(spec: dict[str, Any]) -> Scene:
        things = tuple(Thing(**thing) for thing in spec["things"])
        return Scene(
            spec["background"], things, tuple((left, right) for left, right in spec["touching"])
        )

    def key(self) -> str:
        """A hash of what the scene shows, apart from background and offsets."""
        content = sorted((t.cell, t.kind, t.colour, t.action) for t in self.things)
        text = json.dumps([content, sorted(self.touching)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def split(self) -> str:
        """ "evaluation" for one scene in eight, by its key, else "train"."""
        return "evaluation" if int(self.key(), 16) % 8 == 0 else "train"

    def kinds(self) -> tuple[str, ...]:
        """The kinds in the image, in reading order, each once."""
        return tuple(dict.fromkeys(t.kind for t in sorted(self.things, key=lambda t: t.cell)))

    def of(self, kind: str) -> list[Thing]:
        """All things of a kind."""
        return [t for t in self.things if t.kind == kind]

    def in_contact(self, first: str, second: str) -> bool:
        """Whether a thing of one kind touches one of the other."""
        kind_of = {t.cell: t.kind for t in self.things}
        return any(
            {kind_of[left], kind_of[right]} == {first, second} for left, right in self.touching
        )


def sample_scene(rng: random.Random, split: str) -> Scene:
    """A random scene of the split; takes one to eight tries on average."""
    while True:
        scene = _sample(rng)
        if scene.split() == split:
            return scene


def _sample(rng: random.Random) -> Scene:
    kinds = [rng.choice(KINDS)]
    while len(kinds) < 4 and rng.random() < 0.75:
        companion = COMPANION[kinds[-1]]
        new = companion if companion not in kinds and rng.random() < 0.6 else rng.choice(KINDS)
        if new not in kinds:
            kinds.append(new)
    looks = {
        kind: (rng.choice(COLOURS), rng.choice(ACTIONS) if rng.random() < 0.5 else "")
        for kind in kinds
    }
    placed_kinds = [kind for kind in kinds for _ in range(rng.choice((1, 1, 1, 2, 2, 3)))][:6]
    rng.shuffle(placed_kinds)
    cells = rng.sample(range(9), len(placed_kinds))
    placed = dict(zip(cells, placed_kinds, strict=True))
    touching = tuple(
        (cell, cell + 1)
        for cell in sorted(placed)
        if cell % 3 < 2
        and cell + 1 in placed
        and placed[cell] != placed[cell + 1]
        and rng.random() < 0.6
    )
    # A thing cannot lean to both sides: of two contacts in a row the left one stays.
    touching = tuple(
        pair for i, pair in enumerate(touching) if i == 0 or touching[i - 1][1] != pair[0]
    )
    lean = {left: 1 for left, _ in touching} | {right: -1 for _, right in touching}
    things = tuple(
        Thing(
            kind,
            *looks[kind],
            cell,
            dx=4 * lean[cell] if cell in lean else rng.randint(-1, 1),
            dy=rng.randint(-1, 1),
        )
        for cell, kind in sorted(placed.items())
    )
    return Scene(rng.choice(shapes.BACKGROUNDS), things, touching)


def draw(scene: Scene) -> Image.Image:
    """The image: RGB, SIDE_PX by SIDE_PX, drawn at three times the size for smooth edges."""
    scale = 3
    image = Image.new("RGB", (SIDE_PX * scale, SIDE_PX * scale), scene.background)
    pen = ImageDraw.Draw(image)
    cell_px = SIDE_PX / 3
    for thing in scene.things:
        x = (thing.cell % 3 + 0.5) * cell_px + thing.dx
        y = (thing.cell // 3 + 0.5) * cell_px + thing.dy
        shapes.draw_thing(
            pen,
            thing.kind,
            thing.colour,
            thing.action,
            x * scale,
            y * scale,
            scale,
            scene.background,
        )
    return image.resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)


def plural(kind: str) -> str:
    """The plural of a kind."""
    return kind + ("es" if kind.endswith("ss") else "s")


def how_many(number: str, kind: str) -> str:
    """The question whether there are this many of a kind."""
    return (
        f"Is there one {kind} in this image?"
        if number == "one"
        else f"Are there {number} {plural(kind)} in this image?"
    )


def questions(scene: Scene, rng: random.Random) -> dict[tuple[str, str], list[Question]]:
    """Every yes/no question in AMBER's wording that the scene answers, shuffled, by (type, truth).

    Beyond AMBER, whose existence questions are all answered "no", the (EXISTENCE, "yes") ones are
    here too: a model cannot learn to see from absences alone.
    """
    found: dict[tuple[str, str], list[Question]] = {}
    for question in _all_questions(scene, rng):
        found.setdefault((question.type, question.truth), []).append(question)
    for group in found.values():
        rng.shuffle(group)
    return found


def _all_questions(scene: Scene, rng: random.Random) -> Iterator[Question]:
    present = scene.kinds()
    for kind in KINDS:
        yield Question(
            f"Is there a {kind} in this image?", EXISTENCE, "yes" if kind in present else "no"
        )
    for kind in present:
        first, count = scene.of(kind)[0], len(scene.of(kind))
        for colour in (first.colour, rng.choice([c for c in COLOURS if c != first.colour])):
            yield Question(
                f"Is the {kind} {colour} in this image?",
                STATE,
                "yes" if colour == first.colour else "no",
            )
        for number in (
            NUMBERS[count - 1],
            rng.choice([n for n in NUMBERS if n != NUMBERS[count - 1]]),
        ):
            yield Question(
                how_many(number, kind), NUMBER, "yes" if number == NUMBERS[count - 1] else "no"
            )
        if first.action:
            yield Question(f"Does the {kind} {first.action} in this image?", ACTION, "yes")
        other = rng.choice([a for a in ACTIONS if a != first.action])
        yield Question(f"Does the {kind} {other} in this image?", ACTION, "no")
    for i, first_kind in enumerate(present):
        for second_kind in present[i + 1 :]:
            pair = rng.sample((first_kind, second_kind), 2)
            contact = scene.in_contact(*pair)
            text = f"Is there direct contact between the {pair[0]} and {pair[1]}?"
            yield Question(text, RELATION if contact else RELATION_NO, "yes" if contact else "no")


@dataclass(frozen=True)
class Claim:
    """What a description says of one kind; `action` is "" where it names none."""

    kind: str
    number: str
    colour: str
    action: str


def truth_claims(scene: Scene) -> list[Claim]:
    """What a perfect description of the scene says, in reading order."""
    return [
        Claim(
            kind,
            NUMBERS[len(scene.of(kind)) - 1],
            scene.of(kind)[0].colour,
            scene.of(kind)[0].action,
        )
        for kind in scene.kinds()
    ]


def describe(claims: list[Claim]) -> str:
    """Claims as one sentence: "The image shows two red stars that spin and one blue moon."."""
    parts = []
    for claim in claims:
        many = claim.number != "one"
        noun = plural(claim.kind) if many else claim.kind
        verb = (f" that {claim.action}" + ("" if many else "s")) if claim.action else ""
        parts.append(f"{claim.number} {claim.colour} {noun}{verb}")
    return (
        "The image shows "
        + (", ".join(parts[:-1]) + " and " if len(parts) > 1 else "")
        + parts[-1]
        + "."
    )


_CLAIM = re.compile(
    rf"\b({'|'.join(NUMBERS)}) ({'|'.join(COLOURS)}) ({'|'.join(KINDS)})(?:es|s)?\b"
    rf"(?: that ({'|'.join(ACTIONS)})s?\b)?"
)


def read_claims(description: str) -> list[Claim]:
    """The claims of a description, as far as it is worded as `describe` words them."""
    return [
        Claim(kind, number, colour, action or "")
        for number, colour, kind, action in _CLAIM.findall(description)
    ]


def description_errors(scene: Scene, description: str) -> int:
    """Errors of a description.

    3 for a kind that is not there, 1 for each wrong property, missing kind, or kind named twice.
    """
    truth = {claim.kind: claim for claim in truth_claims(scene)}
    claims = read_claims(description)
    errors = sum(kind not in {c.kind for c in claims} for kind in truth)
    errors += len(claims) - len({c.kind for c in claims})  # a kind described twice
    for claim in claims:
        true_claim = truth.get(claim.kind)
        if true_claim is None:
            errors += 3
        else:
            errors += (
                (claim.number != true_claim.number)
                + (claim.colour != true_claim.colour)
                + (claim.action != true_claim.action)
            )
    return errors
