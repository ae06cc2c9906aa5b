"""An invented COCO in the layout of its four annotation files."""

import json

from PIL import Image

from vlmdpo.benchmarks.chair import words

CATEGORIES = {name: number for number, name in enumerate(sorted(words.load().categories), 1)}


def write(folder, images, *, train=()):
    """The four files.

    Args:
        images: by id, (names of the boxes' categories, reference captions), of val2014.
        train: the same of train2014, which is never empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"val": dict(images), "train": dict(train) or {900: (["dog"], ["A dog."])}}
    for split, of_split in splits.items():
        listed = [
            {"id": i, "file_name": f"COCO_{split}2014_{i:012d}.jpg", "height": 8} for i in of_split
        ]
        boxes = [
            {"image_id": i, "category_id": CATEGORIES[name], "segmentation": [[1.5, 2.0]]}
            for i, (names, _) in of_split.items()
            for name in names
        ]
        captions = [
            {"image_id": i, "id": n, "caption": caption}
            for i, (_, some) in of_split.items()
            for n, caption in enumerate(some)
        ]
        categories = [{"id": number, "name": name} for name, number in CATEGORIES.items()]
        start = {"info": {"year": 2014, "tags": ["a", {"b": []}]}, "images": listed, "licenses": []}
        content = {
            "instances": {**start, "annotations": boxes, "categories": categories},
            "captions": {**start, "annotations": captions},
        }
        for kind, whole in content.items():
            (folder / f"{kind}_{split}2014.json").write_text(json.dumps(whole))
    return folder


def draw_images(folder, ids):
    """An image of each id of val2014."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in ids:
        Image.new("RGB", (32, 32), (i % 256, 80, 120)).save(folder / f"COCO_val2014_{i:012d}.jpg")
    return folder
