"""Sample data in place of your own: ten pictures, and thirty questions about them.

python examples/own_questions/make_sample.py mine
"""

import argparse
import json
import random
from pathlib import Path

from vlmdpo.tiny import scenes

_PICTURES = 10


def main(folder: Path) -> None:
    """Draw pictures into `folder`, and write `folder`/questions.jsonl about them."""
    rng = random.Random(11)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(1, _PICTURES + 1):
        scene = scenes.sample_scene(rng, "evaluation")
        scenes.draw(scene).save(folder / f"{number}.png")
        lines += [{"image": f"{number}.png", **line} for line in _ask(scene, number, rng)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")


def _ask(scene: scenes.Scene, number: int, rng: random.Random) -> list[dict[str, object]]:
    """Three questions about one picture, of two groups; every second answer is no."""
    thing = rng.choice(scene.things)
    absent = [kind for kind in scenes.KINDS if kind not in scene.kinds()]
    is_there = number % 2 == 0
    kind = rng.choice(scene.kinds() if is_there else absent)
    other = rng.choice([colour for colour in scenes.COLOURS if colour != thing.colour])
    colour = other if is_there else thing.colour
    return [
        {
            "question": f"Is there a {kind} in this image?",
            "answer": "yes" if is_there else "no",
            "group": "presence",
        },
        {
            "question": f"Is the {thing.kind} {colour} in this image?",
            "answer": "no" if is_there else "yes",
            "group": "colour",
        },
        {
            "question": f"What colour is the {thing.kind}?",
            "answer": thing.colour,
            "choices": [thing.colour, other] if is_there else [other, thing.colour],
            "group": "colour",
        },
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)
