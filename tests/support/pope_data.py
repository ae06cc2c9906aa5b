"""POPE's question files, made small: a split has a yes and a no question in turn, images shared."""

import json

SPLITS = ("random", "popular", "adversarial")
OBJECTS = ("circle", "square", "star")


def write(folder, images, *, name="pope", count=None, change=None):
    """Three files. The yes questions are the same in all splits, as in POPE.

    Args:
        images: names; each gets six questions a split.
        count: questions of each split; all by default.
        change: called with (split, row), may change the row in place.
    """
    folder.mkdir(exist_ok=True)
    for number, split in enumerate(SPLITS):
        rows = []
        for image in images:
            for i, thing in enumerate(OBJECTS):
                other = f"{SPLITS[number if i else 0]} thing {i}"
                for named, label in ((thing, "yes"), (other, "no")):
                    text = f"Is there a {named} in the image?"
                    row = {"question_id": len(rows) + 1, "image": image, "text": text}
                    rows.append({**row, "label": label})
                    if change:
                        change(split, rows[-1])
        lines = [json.dumps(row) for row in rows[:count]]
        (folder / f"coco_{name}_{split}.json").write_text("\n".join(lines) + "\n")
    return folder


def answers(path, texts, *, first_id=1, ids=True, **more):
    """An answer file in POPE's form."""
    rows = [
        {**({"question_id": first_id + i} if ids else {}), "answer": text, **more}
        for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
