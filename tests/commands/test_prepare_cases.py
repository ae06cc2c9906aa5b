"""Data as found in the field: what prepare makes of each kind of row and file.

`VLMDPO_CASES` names a folder of such inputs, each in a folder of its own. The kinds are made anew
here too, so that none is ever skipped as a whole.
"""

import base64
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq
import pytest
from datasets import load_from_disk

from tests.support.images import encoded, malformed_exif, png_with_long_text
from vlmdpo.data.reasons import SHOWN

GOOD = {"image": "a.png", "question": "What?", "chosen": "Red.", "rejected": "Blue."}


@dataclass(frozen=True)
class Expected:
    """What prepare says: rows kept, reasons, notes, or the error where it cannot go on."""

    rows_out: int = 0
    dropped: dict = field(default_factory=dict)
    changed: dict = field(default_factory=dict)
    images: tuple = ()  # pictures of each kept row
    error: str = ""
    says: str = ""  # in the first example of a dropped row


FOUND = {
    "alpaca-history d.json": Expected(1, images=(1,)),
    "bare-base64 d.jsonl": Expected(3, images=(1, 1, 1)),
    "bare-base64 d.tsv": Expected(error="no known preference format in columns ds, /9j/4AAQ"),
    "cells-of-another-type annotations-list.jsonl": Expected(error="unknown_message 1"),
    "cells-of-another-type instruction-list.jsonl": Expected(error="unknown_message 1"),
    "cells-of-another-type path-nul.jsonl": Expected(1, {"missing_image": 1}),
    "cells-of-another-type role-list.jsonl": Expected(error="unknown_role 1"),
    "cells-of-another-type system-dict.jsonl": Expected(1, {"unknown_message": 1}),
    "json-objects data.json": Expected(error="holds one object with keys data; give a list"),
    "json-objects folder": Expected(1, images=(1,)),
    "lone-surrogate d.jsonl": Expected(1, {"invalid_text": 1}),
    "malformed-exif d.jsonl": Expected(2, changed={"exif_removed": 1}, images=(1, 1)),
    "nameless-error d.jsonl": Expected(
        1, {"unreadable_image": 1}, says="no picture: begins with <html>"
    ),
    "picture-elsewhere d.jsonl": Expected(1, {"image_is_url": 1}, images=(1,)),
    "picture-elsewhere flat.parquet": Expected(1, images=(1,)),
    "picture-elsewhere flat.parquet --map image=image.bytes": Expected(1, images=(1,)),
    # Once their pictures are read, and their templates removed, two rows are equal.
    "picture-in-part d.jsonl": Expected(1, {"duplicate": 1}, images=(1,)),
    "small-things empty.csv": Expected(2, changed={"no_image": 1}, images=(0, 1)),
    "small-things q.tsv": Expected(1, images=(1,)),
    "small-things png.jsonl": Expected(2, changed={"long_text_removed": 1}, images=(1, 1)),
    "template-in-text d.jsonl": Expected(1, {"duplicate": 1}, {"template_removed": 1}, images=(1,)),
    "video-after-first-row d.jsonl": Expected(1, {"video": 1}, images=(1,)),
}


def _check(vlmdpo, dataset, expected, *more):
    """Prepare, twice: the second result has the same bytes."""
    manifests = []
    for name in ("one", "two"):
        code, out, err = vlmdpo(
            *("prepare", "--dataset", dataset, "--output-dir", name, "--no-report", "--json"), *more
        )
        assert "Traceback" not in err
        assert code == (3 if expected.error else 0), err
        if expected.error:
            assert expected.error in err
            assert max(map(len, err.split())) <= SHOWN + 40
            return
        report = json.loads(out)
        manifests.append(Path(name, "manifest.json").read_text())
    assert manifests[0] == manifests[1]
    assert (report["rows_out"], report["dropped"]) == (expected.rows_out, expected.dropped)
    assert {name: report["changed"].get(name) for name in expected.changed} == expected.changed
    examples = [one for shown in report["dropped_examples"].values() for one in shown]
    assert all(len(one) < 300 and " at 0x" not in one for one in examples)
    assert expected.says in "\n".join(examples)
    if expected.images:
        assert tuple(map(len, load_from_disk("one")["images"])) == expected.images


@pytest.mark.slow
@pytest.mark.parametrize("case", list(FOUND))
def test_inputs_found_in_the_field(case, tmp_path, vlmdpo):
    folder = os.environ.get("VLMDPO_CASES")
    if not folder:
        pytest.skip("VLMDPO_CASES names no folder of inputs")
    name, file, *more = case.split()
    shutil.copytree(Path(folder) / name, tmp_path / name)
    _check(vlmdpo, tmp_path / name / file, FOUND[case], *more)


def _part(cell):
    return [{"role": "user", "content": [cell, {"type": "text", "text": "What?"}]}]


_URI = "data:image/png;base64," + base64.b64encode(encoded()).decode()
_ANSWERS = {"chosen": "Red.", "rejected": "Blue."}
# Rows beside one good row, and what becomes of them: (rows, expected without the good row).
ROWS = {
    "history": (
        [{"instruction": "Tail?", "history": [["<image>Animal?", "A fox."]], "images": ["a.png"]}],
        Expected(1, images=(1,)),
    ),
    "history of another type": (
        [{"instruction": "Tail?", "history": ["<image>Animal?"], "images": ["a.png"]}] * 2
        + [{"instruction": ["Say", "hi"]}, {"instruction": "Hm?"}],
        Expected(1, {"unknown_message": 3}),
    ),
    "base64": (
        [{**GOOD, "image": base64.b64encode(encoded(kind="JPEG")).decode()}],
        Expected(1, images=(1,)),
    ),
    "cells of another type": (
        [
            GOOD,
            *({**GOOD, "image": cell} for cell in ("a.png\0", "\ud83d.png", "x" * 5000)),
            *({**GOOD, "image": cell} for cell in (7, {"data": "x"}, [["gone.png"]])),
            *({**GOOD, "system": cell} for cell in ({"role": "system"}, 7, ["x"])),
            {**GOOD, "chosen": {"role": ["assistant"], "content": "Red"}},
            *({**GOOD, "question": cell} for cell in (7, 7.5, float("nan"), {}, [None], True)),
            *({**GOOD, "rejected": cell} for cell in (float("nan"), [7], "half \ud83d", "NUL \0")),
            {**GOOD, "question": "No picture?", "image": float("nan")},
        ],
        Expected(
            2,
            {
                **{"missing_image": 4, "unreadable_image": 2, "unknown_message": 8},
                **{"unknown_role": 2, "empty_prompt": 1, "empty_rejected": 1, "invalid_text": 2},
            },
            {"no_image": 1},
        ),
    ),
    "ratings of another type": (
        [
            {"image": "a.png", "prompt": f"{number}?", "completions": completions}
            for number, completions in enumerate(
                [
                    *([{"annotations": a, "response": "x"}] * 2 for a in ([4, 5], 7, None)),
                    *([], {"annotations": [1, 2], "response": ["x"]}, 7, {"a": 7}),
                    [{"annotations": {"Help": rating}, "response": rating} for rating in "24"],
                ]
            )
        ],
        Expected(1, {"unknown_message": 5, "unrated": 2}),
    ),
    "preferences of another type": (
        [
            {
                **{"image": "a.png", "conversations": [{"from": "human", "value": f"{number}?"}]},
                **{"output_1": "Red.", "output_2": "Blue.", "preference": preference},
            }
            for number, preference in enumerate((2.0, "1", 1, [1], None, 3, float("nan"), True))
        ],
        Expected(4, {"tied_ranking": 4}),
    ),
    "halves of characters": (
        [GOOD, {**GOOD, "question": "Which \ud83d?"}],
        Expected(1, {"invalid_text": 1}),
    ),
    "pictures elsewhere": (
        [
            {**GOOD, "images": []},
            {**GOOD, "image": {"url": "http://x/a.png"}},
            {**GOOD, "image": {"url": _URI}, "question": "Which?"},
            {**GOOD, "image": None, "images": [None]},
        ],
        Expected(2, {"image_is_url": 1, "missing_image": 1}, images=(1, 1)),
    ),
    "flat columns": (
        [{"image.bytes": None, "image.path": "a.png", **_ANSWERS, "question": "What?"}],
        Expected(1, images=(1,)),
    ),
    "pictures in parts": (
        [
            {"prompt": _part(part), **_ANSWERS, "chosen": f"Red {number}."}
            for number, part in enumerate(
                [
                    {"type": "image", "image": "a.png"},
                    {"type": "image_url", "image_url": {"url": _URI}},
                    {"type": "input_image", "image_url": _URI},
                    {"image": "a.png"},
                    {"type": "image_url", "image_url": {"url": "https://x/a.png"}},
                    {"type": "image"},
                    {"type": ["image"]},
                ]
            )
        ],
        Expected(
            4,
            {"image_is_url": 1, "placeholder_miscount": 1, "unknown_message": 1},
            images=(1, 1, 1, 1),
        ),
    ),
    "templates": (
        [
            {
                **GOOD,
                "question": "A chat between a user and an assistant. USER: <image>\nA? ASSISTANT:",
            },
            {**GOOD, "question": "<|im_start|>user\nB?<|im_end|>\n<|im_start|>assistant\n"},
            {**GOOD, "question": "USER: A? ASSISTANT: Yes. USER: C? ASSISTANT:"},
            {**GOOD, "question": "D?", "chosen": "Red.</s>", "rejected": "Blue. <|im_end|>\n"},
            {**GOOD, "question": "E?", "chosen": "<s>Red</s>"},
            {**GOOD, "question": "F?", "chosen": "Blue.</s>"},
        ],
        Expected(
            5,
            {"identical_answers": 1},
            {
                **{"template_removed": 2, "template_in_prompt": 1, "end_token_removed": 1},
                "special_token_in_text": 1,
            },
        ),
    ),
    "videos": (
        [
            {**GOOD, "image": None, "video": "clip.mp4"},
            {**GOOD, "video": None},
            {**GOOD, "videos": ["clip.mp4"]},
            {**GOOD, "question": "<video>What?"},
        ],
        Expected(1, {"video": 3}, images=(1,)),
    ),
    "first rows of another kind": (
        [{"note": "by A"}, {**GOOD, "video": "clip.mp4"}, GOOD],
        Expected(1, {"video": 1, "empty_prompt": 1}),
    ),
}


@pytest.mark.parametrize("kind", list(ROWS))
def test_every_kind_of_row_is_read_or_dropped_by_name(kind, tmp_path, vlmdpo):
    rows, expected = ROWS[kind]
    rows = [row if {"note", "output_1"} & set(row) else {**_ANSWERS, **row} for row in rows]
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _check(vlmdpo, "d.jsonl", expected)


def _lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


_DEEP = b'{"image": "a.png", "question": "Deep?", "more": ' + b"[" * 50_000 + b"]" * 50_000 + b"}\n"
_TWICE = b'{"image": "a.png", "image": "b.png", "question": "?", "chosen": "a", "rejected": "b"}\n'
_HUGE = b'{"image": "a.png", "question": "Huge?", "n": ' + b"9" * 5000 + b"}\n"
_CELL = "x" * 200_000
FILES = {
    "deep.jsonl": (_lines(GOOD) + _DEEP, Expected(1, {"nested_too_deeply": 1})),
    "deep.json": (
        b"[" + json.dumps(GOOD).encode() + b",\n" + _DEEP + b"]",
        Expected(1, {"nested_too_deeply": 1}),
    ),
    "twice.jsonl": (_TWICE + _lines(GOOD), Expected(1, {"duplicate_key": 1}, says="'image'")),
    "huge.jsonl": (_lines(GOOD) + _HUGE, Expected(1, {"bad_json": 1})),
    "latin.jsonl": (
        _lines(GOOD) + json.dumps({**GOOD, "question": "é?"}, ensure_ascii=False).encode("cp1252"),
        Expected(1, {"invalid_text": 1}, says="not UTF-8"),
    ),
    "bom.jsonl": (b"\xef\xbb\xbf" + _lines(GOOD), Expected(1)),
    "two-boms.jsonl": (
        b"\xef\xbb\xbf" + _lines(GOOD) + b"\xef\xbb\xbf" + _lines({**GOOD, "question": "?"}),
        Expected(2),
    ),
    "utf-16.json": (json.dumps([GOOD]).encode("utf-16"), Expected(1)),
    "line-ends.jsonl": (
        json.dumps({**GOOD, "chosen": "a\u2028b\x85c\u2029d"}, ensure_ascii=False).encode()
        + b'\n{"image": "a.png", "question": "raw \x0c?", "chosen": "a", "rejected": "b"}\n',
        Expected(2),
    ),
    "wrapped.json": (
        json.dumps({"data": [GOOD]}, indent=1).encode(),
        Expected(error="holds one object with keys data; give a list of rows"),
    ),
    "by-picture.json": (
        json.dumps({"a.png": GOOD, "b.png": GOOD}).encode(),
        Expected(error="holds one object with keys a.png, b.png; give a list of rows"),
    ),
    "objects.json": (
        b"\n".join(json.dumps(row, indent=2).encode() for row in (GOOD, {**GOOD, "chosen": "x"})),
        Expected(2),
    ),
    "semicolons.csv": (
        "image;question;chosen;rejected\na.png;Où, là?;Rot;Blau\n".encode("cp1252"),
        Expected(1),
    ),
    "empty.csv": (
        b"image,question,chosen,rejected\n,2+2?,4,5\na.png,What?,Red.,Blue.\n",
        Expected(2, changed={"no_image": 1}, images=(0, 1)),
    ),
    "long-cell.csv": (
        f"image,question,chosen,rejected,note\na.png,What?,Red.,Blue.,{_CELL}\n".encode(),
        Expected(1),
    ),
    "quotes.tsv": (
        b'image\tquestion\tchosen\trejected\na.png\t"Stop" - what does it say?\tStop\tGo\n',
        Expected(1),
    ),
    "two-columns.csv": (
        b"image,question,chosen,chosen\na.png,What?,Red.,Blue.\n",
        Expected(error="two columns named 'chosen'"),
    ),
}


@pytest.mark.parametrize("name", list(FILES))
def test_every_kind_of_file_is_read_or_refused_in_words(name, tmp_path, vlmdpo):
    content, expected = FILES[name]
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / name).write_bytes(content)
    _check(vlmdpo, name, expected)
    if name == "quotes.tsv":
        question = load_from_disk("one")[0]["prompt"][0]["content"][-1]["text"]
        assert question == '"Stop" - what does it say?'


def test_a_folder_with_a_description_beside_its_data(tmp_path, vlmdpo):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded())
    (folder / "mine.json").write_text(json.dumps([GOOD]))
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.json"}}))
    (folder / "._mine.json").write_bytes(b"\0\5\x16\7")  # macOS writes such beside every file
    _check(vlmdpo, folder, Expected(1, images=(1,)))


def test_flat_columns_of_parquet_are_taken_and_mapped(tmp_path, vlmdpo):
    columns = {"image.bytes": [encoded()], "question": ["?"], "chosen": ["a"], "rejected": ["b"]}
    pq.write_table(pyarrow.table(columns), "flat.parquet")
    _check(vlmdpo, "flat.parquet", Expected(1, images=(1,)))
    shutil.rmtree("one")
    shutil.rmtree("two")
    _check(vlmdpo, "flat.parquet", Expected(1, images=(1,)), "--map", "image=image.bytes")


def test_a_text_that_is_not_utf8_costs_its_row_alone(tmp_path, vlmdpo):
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 5, 8, 14))
    buffers = map(pyarrow.py_buffer, (offsets, b"What?\xff\xfe?Which?"))
    texts = pyarrow.StringArray.from_buffers(3, *buffers)
    table = pyarrow.table({"question": texts, "chosen": ["a"] * 3, "rejected": ["b"] * 3})
    pq.write_table(table, "d.parquet")
    _check(vlmdpo, "d.parquet", Expected(2, {"unreadable_row": 1}))


def test_bad_pictures_cost_their_row_alone(tmp_path, vlmdpo, monkeypatch):
    """Sizes are looked at before anything is read; a FIFO is not waited for."""
    monkeypatch.setattr("vlmdpo.data.image_cells.MAX_BYTES", 50_000)
    pictures = {
        "good.png": encoded(),
        "exif.jpg": malformed_exif(),
        "texts.png": png_with_long_text(),
        "page.jpg": b"<html>404</html>",
        "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\n",
        "ghost.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "phone.jpg": b"\0\0\0\x18ftypheic\0\0\0\0",
        "nothing.jpg": b"",
    }
    for name, content in pictures.items():
        (tmp_path / name).write_bytes(content)
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(40_000_000_000)
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "folder.png").mkdir()
    special = ["sparse.png", "fifo.png", "loop.png", "folder.png"]
    (tmp_path / "d.jsonl").write_bytes(
        _lines(*({**GOOD, "image": name} for name in [*pictures, *special]))
    )
    _check(
        vlmdpo,
        "d.jsonl",
        Expected(
            3,
            {"unreadable_image": 5, "oversized_image": 1, "missing_image": 3},
            {"exif_removed": 1, "long_text_removed": 1},
            says="no picture: begins with <html>",
        ),
    )
    examples = json.loads(Path("one/manifest.json").read_text())["dropped_examples"]
    assert "git lfs pull" in str(examples)


def test_our_own_mistakes_are_no_reasons(tmp_path, vlmdpo, monkeypatch):
    from vlmdpo.data import store, work

    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "d.jsonl").write_bytes(_lines(GOOD))
    for owner, name in ((store, "row_of"), (work, "bounded")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *_: None + 1)
            with pytest.raises(TypeError):
                vlmdpo("prepare", "--dataset", "d.jsonl", "--output-dir", "out")


@pytest.mark.parametrize("folder", [".", "/", "..", "a/../.."])
def test_a_folder_that_is_worked_in_is_not_replaced(folder, tmp_path, vlmdpo, monkeypatch):
    (tmp_path / "here" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    code, _, err = vlmdpo("prepare", "--limit", "2", "--output-dir", folder)
    assert (code, "working folder or above it" in err) == (3, True)
    assert not any((tmp_path / "here" / "a").iterdir())


def test_links_of_a_folder_of_images_may_lead_to_the_one_allowed(tmp_path, vlmdpo):
    for name in ("data", "store"):
        (tmp_path / name).mkdir()
    (tmp_path / "store" / "b1").write_bytes(encoded())
    (tmp_path / "data" / "a.png").symlink_to("../store/b1")
    (tmp_path / "data" / "d.jsonl").write_bytes(_lines(GOOD))
    base = ["prepare", "--dataset", "data/d.jsonl", "--json", "--output-dir"]
    code, _, err = vlmdpo(*base, "out")
    assert (code, "image_outside_root" in err) == (3, True)
    code, out, _ = vlmdpo(*base, "out", "--allow-root", "store")
    assert (code, json.loads(out)["rows_out"]) == (0, 1)
    code, _, err = vlmdpo(*base, "out2", "--allow-root", "gone")
    assert (code, "--allow-root: the folder 'gone' does not exist" in err) == (3, True)
