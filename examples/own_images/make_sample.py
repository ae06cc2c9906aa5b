"""Sample data in place of your own: a folder of images, and a table of preferences about them.

python examples/own_images/make_sample.py my [--pictures 120]
"""

import argparse
import csv
import random
from pathlib import Path

from vlmdpo.tiny import scenes

_QUESTIONS_PER_IMAGE = 3


def main(folder: Path, count: int = 120) -> None:
    """Draw images into `folder`/images and write `folder`/preferences.csv."""
    rng = random.Random(7)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with (folder / "preferences.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "question", "chosen", "rejected"])
        for number in range(1, count + 1):
            scene = scenes.sample_scene(rng, "train")
            name = f"{number:04d}.png"
            scenes.draw(scene).save(folder / "images" / name)
            questions = [
                question for group in scenes.questions(scene, rng).values() for question in group
            ]
            for question in rng.sample(questions, min(_QUESTIONS_PER_IMAGE, len(questions))):
                right, wrong = ("Yes", "No") if question.truth == "yes" else ("No", "Yes")
                table.writerow([name, question.text, right, wrong])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=120)
    given = parser.parse_args()
    main(given.folder, given.pictures)
