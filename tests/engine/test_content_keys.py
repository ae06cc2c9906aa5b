"""Keys of images and answers: equal for equal content, whatever else differs."""

import numpy as np
from PIL import Image

from vlmdpo.data.pairs import message
from vlmdpo.engine.content_keys import answer_key, content_keys, image_key, pair_keys


def picture(seed, size=(6, 4)):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_an_image_is_known_by_mode_size_and_pixels():
    one = picture(0)
    assert image_key([one]) == image_key([one.copy()])
    assert len(image_key([one])) == 32
    assert image_key([]) == ""
    turned = Image.frombytes("RGB", one.size[::-1], one.tobytes())
    gray = Image.new("L", (6, 4)), Image.new("1", (48, 4)), Image.new("L", (4, 6))
    palette = gray[0].convert("P"), gray[0].convert("P")
    palette[1].putpalette([255 - value for value in range(256) for _ in range(3)])
    several = [picture(1)], [one, picture(1)], [picture(1), one], [one, one]
    keys = [image_key(images) for images in ([one], [turned], *several)]
    keys += [image_key([image]) for image in (*gray, *palette)]
    assert len(set(keys)) == len(keys)


def example(image, prompt, chosen, rejected, **more):
    return {
        "images": [image],
        "prompt": [message("user", prompt, 1)],
        "chosen": [message("assistant", chosen)],
        "rejected": [message("assistant", rejected)],
        **more,
    }


def test_an_answer_is_known_by_images_prompt_and_text():
    rows = [
        example(picture(0), "Is it?", "Yes", "No", row=5, source_row=9),
        example(picture(0), "Is it?", "No", "Yes"),
        example(picture(1), "Is it?", "Yes", "No"),
        example(picture(0), "Was it?", "Yes", "No"),
    ]
    keys = content_keys(rows)
    assert keys["image_keys"] == [image_key(row["images"]) for row in rows]
    yes_no, no_yes, *others = zip(keys["answer_keys"][:4], keys["answer_keys"][4:], strict=True)
    assert yes_no == no_yes[::-1]
    assert len({*yes_no, *others[0], *others[1]}) == 6
    assert content_keys(rows[::-1])["answer_keys"][3] == yes_no[0]


def test_plain_text_and_rows_without_images_have_keys_too():
    row = {"prompt": "Is it?", "chosen": "Yes", "rejected": "\ud800"}
    keys = content_keys([row, {**row, "images": None}, {**row, "images": []}])
    assert keys["image_keys"] == [""] * 3
    assert len(set(keys["answer_keys"])) == 2
    assert keys["answer_keys"][0] == answer_key("", "Is it?", "Yes")


def test_keys_of_pairs_follow_both_answers():
    pairs = pair_keys(["a", "b", "a", "b", "c", ""])
    assert len(set(pairs)) == 6
    assert pairs[-1] == "", "no answer"
    assert pair_keys(["a", "b"]) == pair_keys(["b", "a"])[::-1]
