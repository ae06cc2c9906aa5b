"""eval-amber: a question or an image that cannot be asked stays unanswered, and ends nothing."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from vlmdpo.engine import decode
from vlmdpo.tiny import evaluation

NAMES = ("SCENE_1.png", "SCENE_2.png", "SCENE_3.png")


@pytest.fixture
def data(tmp_path):
    """Three images with two questions each, in files with a byte order mark."""
    folder = tmp_path / "small"
    shutil.copytree(evaluation.FOLDER, folder)
    (folder / "query" / "query_generative.json").unlink()
    (folder / "image").mkdir()
    for name in NAMES:
        evaluation.draw_image(name).save(folder / "image" / name)
    path = folder / "query" / "query_discriminative.json"
    asked = [q for q in json.loads(path.read_text()) if q["image"] in NAMES]
    asked = [q for name in NAMES for q in [q for q in asked if q["image"] == name][:2]]
    asked[0]["query"] = f"<image>\n{asked[0]['query']}"
    asked[2]["query"] = "half \ud83d"
    path.write_text("\ufeff" + json.dumps(asked), encoding="utf-8")
    path = folder / "annotations.json"
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    return folder, asked


def test_what_cannot_be_asked_is_named(data, vlmdpo, monkeypatch):
    folder, asked = data
    # An EXIF block whose TIFF header is cut.
    Image.new("RGB", (72, 72)).save(folder / "image" / NAMES[0], "JPEG", exif=b"Exif\x00\x00II*")
    plain = decode.OpenedImage._prompt

    def refusing(opened, question):
        if opened.image.getpixel((0, 0)) == third:  # stands for a processor's error
            raise ValueError("absolute aspect ratio")
        return plain(opened, question)

    third = (1, 2, 3)
    Image.new("RGB", (72, 72), third).save(folder / "image" / NAMES[2])
    monkeypatch.setattr(decode.OpenedImage, "_prompt", refusing)
    monkeypatch.setattr(
        "vlmdpo.benchmarks.ask.Asking._refuses",
        lambda asking, image, one: (
            image.getpixel((0, 0)) == third
            and not asking._leave_out(
                asking.outcome.bad_pictures, one.image, one.image, "too narrow"
            )
        ),
    )
    command = ("eval-amber", "--data", folder, "--output-dir", "out", "--json")
    code, out, err = vlmdpo(*command)
    assert code == 0, err
    report = json.loads(out)
    assert set(report["bad_questions"]) == {str(asked[2]["id"])}
    assert report["bad_pictures"] == {NAMES[2]: "too narrow"}
    answered = {entry["id"] for entry in json.loads(Path("out/answers_base.json").read_text())}
    assert answered == {asked[0]["id"], asked[1]["id"], asked[3]["id"]}
    code, _, err = vlmdpo(*command, "--strict", "--overwrite")
    assert code == 3
    assert "cannot be asked" in err


def test_an_image_that_the_processor_refuses_is_recognized(data, vlmdpo, tiny_model_parts):
    from types import SimpleNamespace

    from vlmdpo.benchmarks.ask import Asking, Outcome

    asking = Asking.__new__(Asking)
    asking.config, asking.outcome = SimpleNamespace(strict=False), Outcome("shared")
    asking.processor = tiny_model_parts[1]
    one = SimpleNamespace(image="a.png", text="why")
    assert not asking._refuses(evaluation.draw_image(NAMES[0]), one)
    assert asking._refuses("not an image", one)
    assert list(asking.outcome.bad_pictures) == ["a.png"]
