"""infer: no line of a question file ends the call; each that cannot be asked is counted by name."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from vlmdpo.data.image_cells import inside
from vlmdpo.data.images import open_file
from vlmdpo.data.left_out import LeftOut, in_words
from vlmdpo.data.reasons import BadImage, BadRow
from vlmdpo.tiny import evaluation

QUESTION = "Is there a moon in this image?"
# A kind of line, and the reason it is counted by; None for a line that is answered.
LINES = {
    '{"image": "a.png", "question": "<image> Is there a moon in this image?"}': None,
    '{"image": "a.png", "question": "<image>\\n<image>"}': "empty_prompt",
    '{"image": "a.png", "question": "<image> one <image> two"}': "placeholder_miscount",
    '{"image": "a.png", "question": "a\u2028b\u0085c\x0bd"}'.replace("\x0b", "\\u000b"): None,
    '{"image": "a.png", "question": "half \\ud83d"}': "invalid_text",
    '{"image": "a\\u0000.png", "question": "q"}': "missing_image",
    '{"image": "\\ud83d.png", "question": "q"}': "missing_image",
    '{"image": "circle", "question": "q"}': "missing_image",
    '{"image": "' + "n" * 300 + '.png", "question": "q"}': "missing_image",
    '{"image": "pipe", "question": "q"}': "missing_image",
    '{"image": "../x.png", "question": "q"}': "image_outside_root",
    '{"image": "text.png", "question": "q"}': "unreadable_image",
    '{"image": "exif.jpg", "question": "q"}': None,
    '{"image": ["a.png"], "question": "q"}': "unreadable_image",
    '{"image": NaN, "question": "q"}': "missing_image",
    '{"image": "a.png", "question": ["q"]}': "unknown_message",
    '{"image": "a.png", "question": 5}': "unknown_message",
    '{"image": "a.png", "question": null}': "missing_question",
    '{"question": "q"}': "missing_image",
    '{"id": [1], "image": "a.png", "question": "q"}': "unknown_id",
    '{"id": 1.0, "image": "a.png", "question": "q"}': "duplicate_id",
    '["a.png", "q"]': "not_an_object",
    "[" * 100_000 + "]" * 100_000: "nested_too_deeply",
    "[" * 100_000: "bad_json",
    "{": "bad_json",
    "\udcff": "bad_utf8",
}


@pytest.fixture
def folder(tmp_path):
    evaluation.draw_image("SCENE_1.png").save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("<html>")
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    # An EXIF block whose TIFF header is cut.
    Image.new("RGB", (40, 30), "red").save(tmp_path / "exif.jpg", exif=b"Exif\x00\x00II*")
    return tmp_path


def _answered(vlmdpo, file, *more):
    code, out, err = vlmdpo("infer", "--input", file, "--output", "o.jsonl", "--json", *more)
    assert code == 0, err
    return json.loads(out)


def test_each_kind_of_line_is_answered_or_counted_with_its_number(folder, vlmdpo):
    text = "".join(line + "\n" for line in LINES)
    Path("q.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode("utf-8", "surrogateescape"))
    report = _answered(vlmdpo, "q.jsonl", "--max-new-tokens", "4", "--batch-size", "4")
    expected: dict[str, list[str]] = {}
    for number, reason in enumerate(LINES.values(), start=1):
        if reason is not None:
            expected.setdefault(reason, []).append(f"line {number}")
    found = {
        reason: sorted((entry["row"] for entry in rows["rows"]), key=lambda row: int(row[5:]))
        for reason, rows in report["left_out"].items()
    }
    assert found == expected
    assert report["answered_now"] == list(LINES.values()).count(None)
    ids = [json.loads(line)["id"] for line in Path("o.jsonl").read_text().split("\n")[:-1]]
    assert ids == [n for n, reason in enumerate(LINES.values(), start=1) if reason is None]
    again = _answered(vlmdpo, "q.jsonl")
    assert (again["answered_now"], again["answered_before"]) == (0, len(ids))


def test_the_screen_names_reasons_and_lines(folder, vlmdpo):
    Path("q.jsonl").write_text(
        '{"image": "a.png", "question": "why"}\n{"image": "no.png", "question": "why"}\n'
    )
    code, out, err = vlmdpo("infer", "--input", "q.jsonl", "--output", "o.jsonl", "-q")
    assert (code, out) == (0, "1 answer written: o.jsonl\n")
    assert "1 line of the file could not be asked: missing_image: 1 (line 2)" in err


def test_a_file_of_which_nothing_can_be_asked_ends_the_call(folder, vlmdpo):
    Path("q.jsonl").write_text('{"image": "text.png", "question": "why"}\n')
    code, _, err = vlmdpo("infer", "--input", "q.jsonl", "--output", "o.jsonl")
    assert code == 3
    assert "of 1 question of 'q.jsonl' none can be asked: unreadable_image: 1 (line 1)" in err


def test_one_question_that_cannot_be_asked_is_one_line(folder, vlmdpo):
    asked = ("infer", "--image", "a.png", "--max-new-tokens", "4", "--question")
    assert vlmdpo(*asked, f"<image> {QUESTION}")[0] == 0
    code, _, err = vlmdpo(*asked, "<image><image> two")
    assert code == 3
    assert "this question cannot be asked: 2 image placeholders" in err
    assert vlmdpo("infer", "--image", "exif.jpg", "--max-new-tokens", "4")[0] == 0


def test_what_a_processor_refuses_leaves_the_rest_of_the_batch(folder, vlmdpo, monkeypatch):
    from vlmdpo.engine import generate

    plain = generate.model_inputs

    def refusing(model, processor, images, questions):  # stands for a library's error
        if "refused" in questions:
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return plain(model, processor, images, questions)

    monkeypatch.setattr(generate, "model_inputs", refusing)
    asked = [{"image": "a.png", "question": text} for text in ("one", "refused", "two")]
    Path("q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    report = _answered(vlmdpo, "q.jsonl", "--max-new-tokens", "2")
    assert report["answered_now"] == 2
    assert report["left_out"] == {
        "processor_refuses": {
            "count": 1,
            "rows": [{"row": "line 2", "detail": "absolute aspect ratio must be smaller than 200"}],
        }
    }


def test_an_error_of_ours_stays_a_traceback(folder, vlmdpo, monkeypatch):
    monkeypatch.setattr("vlmdpo.engine.generate.render_question", None)
    Path("q.jsonl").write_text('{"image": "a.png", "question": "q"}\n')
    with pytest.raises(TypeError, match="not callable"):
        vlmdpo("infer", "--input", "q.jsonl", "--output", "o.jsonl")


def test_reasons_are_short_and_joined():
    first, second = LeftOut(), LeftOut()
    for number in range(7):
        first.add(f"line {number}", BadRow("refused", "x" * 900))
    second.add("line 9", BadImage("missing_image", "none"))
    joined = LeftOut.joined([first, second])
    assert len(joined) == 8
    assert list(joined.report()) == ["missing_image", "refused"]
    said = in_words(joined.report())
    assert said.startswith("missing_image: 1 (line 9): none; refused: 7 (line 0, line 1, ")
    assert "line 4 and 2 more" in said


def test_a_path_that_is_none_is_a_bad_image(folder):
    for name in ("a\0b", "\ud83d", "circle"):
        with pytest.raises(BadImage):
            open_file(inside(folder, name))


# Folders of VLMDPO_CASES, what is asked there, and how many questions are answered.
CASES = {
    "image-mark-in-question": (("--input", "q.jsonl"), None),
    "line-separators": (("--input", "q.jsonl"), None),
    "line-separators/raw": (("--input", "raw.jsonl"), None),
    "lone-surrogate": (("--input", "q.jsonl"), {"invalid_text"}),
    "malformed-exif": (("--image", "exif.jpg"), None),
    "small-things": (("--input", "bom.jsonl"), None),
}


@pytest.mark.parametrize("case", CASES)
def test_cases_from_the_field(case, tmp_path, vlmdpo):
    cases = os.environ.get("VLMDPO_CASES")
    if not cases:
        pytest.skip("VLMDPO_CASES names no folder of cases; smaller ones of each kind stand above")
    for path in Path(cases, case.partition("/")[0]).iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    asked, reasons = CASES[case]
    output = ("--output", "o.jsonl") if asked[0] == "--input" else ()
    command = ("infer", *asked, *output, "--json", "--max-new-tokens", "4")
    code, out, err = vlmdpo(*command)
    if reasons and code == 3:
        assert all(reason in err for reason in reasons)
        return
    assert code == 0, err
    if output:
        first = json.loads(out)
        assert set(first["left_out"]) == (reasons or set())
        code, out, err = vlmdpo(*command)
        assert code == 0, err
        assert json.loads(out)["answered_before"] == first["answered_now"] > 0
