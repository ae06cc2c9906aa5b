"""What is asked of which image, from each kind of input, and what is refused."""

import json
import os

import pytest
from PIL import Image

from vlmdpo.config import MakePairsConfig
from vlmdpo.data.reasons import BadImage
from vlmdpo.errors import DataError
from vlmdpo.feedback import pictures


@pytest.fixture
def folder(tmp_path):
    """Two images, one in a folder below, and what must not be taken for one."""
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(root / "b.png")
    Image.new("RGB", (8, 8), "blue").save(root / "more" / "a.JPG")
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_bytes(b"")
    return root


def _read(**options):
    return pictures.read_pictures(MakePairsConfig(**options))


def test_a_folder_gets_built_in_prompts_by_the_seed(folder):
    asked, left_out = _read(input=folder)
    assert [one.name for one in asked] == ["b.png", "more/a.JPG"]
    assert not left_out
    assert all(len(one.prompts) == 1 for one in asked)
    assert all(one.prompts[0] in pictures.DESCRIPTION_PROMPTS for one in asked)
    assert [one.prompts for one in _read(input=folder)[0]] == [one.prompts for one in asked]
    by_seed = {tuple(p.prompts for p in _read(input=folder, seed=seed)[0]) for seed in range(9)}
    assert len(by_seed) > 1
    asked, _ = _read(input=folder, prompts_per_image=3, limit=1)
    assert [len(set(one.prompts)) for one in asked] == [3]
    assert asked[0].read() == (folder / "b.png").read_bytes()


def test_the_output_folder_is_no_input_and_names_may_be_no_utf8(folder):
    Image.new("RGB", (8, 8)).save(folder / os.fsdecode(b"\xff.png"))
    (folder / "pairs" / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "pairs" / "images" / "1.png")
    asked, _ = _read(input=folder, output_dir=folder / "pairs")
    assert [one.name for one in asked] == ["b.png", "more/a.JPG", os.fsdecode(b"\xff.png")]


def test_prompts_of_a_file_are_all_asked(folder, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text('﻿What is this?\n\n{"question": "Is it red?"}\nWhat is this?\n')
    asked, _ = _read(input=folder, prompts=file)
    assert [one.prompts for one in asked] == [("What is this?", "Is it red?")] * 2
    ids = {one.id_of(prompt) for one in asked for prompt in one.prompts}
    assert len(ids) == 4


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "contains no prompts"),
        (b'["a", "b"]', "begins as a JSON list"),
        (b'ok\n{"prompt": "a"}', "line 2: a JSON line must hold a text named question"),
        (b'{"question": ""}', "line 1: a JSON line must hold"),
        (b"{cut", "line 1 is not valid JSON"),
        (b"one <image> two <image>", "line 1 cannot be asked"),
        (b"\xff", "cannot read"),
    ],
)
def test_a_prompts_file_of_another_form_names_the_line(folder, tmp_path, content, says):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=says):
        _read(input=folder, prompts=file)


def test_questions_are_grouped_by_image_and_bad_lines_left_out(folder, tmp_path):
    file = folder / "q.jsonl"
    lines = [
        {"image": "b.png", "question": "one?"},
        {"image": "more/a.JPG", "question": "two?"},
        {"image": "b.png", "question": "three?"},
        {"image": "../x.png", "question": "outside"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked, left_out = _read(input=file)
    assert [(one.name, one.prompts) for one in asked] == [
        ("b.png", ("one?", "three?")),
        ("more/a.JPG", ("two?",)),
    ]
    assert list(left_out.by_reason) == ["image_outside_root"]
    with pytest.raises(DataError, match="leave it out"):
        _read(input=file, prompts=tmp_path / "p.txt")


def test_prepared_data_is_asked_again(folder, tmp_path, vlmdpo):
    answers = {"chosen": "Red.", "rejected": "Blue."}
    turns = [{"role": role, "content": "Hm?"} for role in ("user", "assistant", "user")]
    rows = [
        {"image": "b.png", "prompt": "one?", **answers},
        {"image": "b.png", "prompt": "two?", **answers},
        {"image": "b.png", "prompt": "two?", **answers, "rejected": "Green."},
        {"image": "more/a.JPG", "prompt": "one?", **answers},
        {
            "image": "b.png",
            "prompt": turns,
            **{name: [{"role": "assistant", "content": text}] for name, text in answers.items()},
        },
    ]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    assert vlmdpo("prepare", "--dataset", file, "--output-dir", "data")[0] == 0
    asked, left_out = _read(input=tmp_path / "data")
    assert sorted(one.prompts for one in asked) == [("one?",), ("one?", "two?")]
    assert not left_out
    assert {one.read() for one in asked} == {
        (folder / name).read_bytes() for name in ("b.png", "more/a.JPG")
    }
    file.write_text(json.dumps(rows[4]) + "\n")
    assert vlmdpo("prepare", "--dataset", file, "--output-dir", "turns")[0] == 0
    with pytest.raises(DataError, match="none can be asked: not_one_turn"):
        _read(input=tmp_path / "turns")


def test_what_is_no_input(tmp_path, folder):
    with pytest.raises(DataError, match="does not exist"):
        _read(input=tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="contains no images"):
        _read(input=tmp_path / "empty")
    with pytest.raises(DataError, match="there are only 8 prompts"):
        _read(input=folder, prompts_per_image=9)
    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere.png")
    linked = next(one for one in _read(input=folder)[0] if one.name == "link.png")
    with pytest.raises(BadImage, match="points outside"):
        linked.read()
